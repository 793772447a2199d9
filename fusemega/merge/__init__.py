"""Merging several fine-tuned variants of one model, out of core: a plan, then row blocks through one method."""
