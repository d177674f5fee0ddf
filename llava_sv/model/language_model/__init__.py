"""The decoder: transformers' LLaMA plus Skip-FFN and the skip KV-cache."""
