"""The model: encoders, projectors, fusion, language model, probability mapper."""
