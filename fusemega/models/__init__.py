"""Model families: Hugging Face configurations as Megatron-core models, and the rules that move their weights."""
