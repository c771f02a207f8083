"""All that only the embedded model needs: residual tower, tower stage, outlier exposure, tokenizer."""
