"""How a model is spread over ranks: one small class each."""
