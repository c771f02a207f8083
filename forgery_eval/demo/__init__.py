"""The demonstration: bundled samples analysed by the embedded model, shown on one page; and that model's card."""
