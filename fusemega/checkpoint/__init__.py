"""Weight files: Hugging Face safetensors folders and Megatron distributed checkpoints. Nothing else opens them."""
