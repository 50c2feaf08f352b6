"""Who reads the kept patches: the model's own LLM on tokens, a vision-language model, or a server, on pictures."""
