"""Responses to prompts: sampled from a model here or behind a server, recorded as they come, and made into groups.

prompts.py             reads prompts, and the key that a prompt is known by
engine.py              what every engine takes and gives
"""
