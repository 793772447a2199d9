"""From hidden states to log-probabilities: the only code that touches logits.

* `_head.py`: the kernel: chunks of tokens, vocabulary-parallel; `_query.py`, `_listed.py`, `_members.py`,
  `_sums.py`, `_slopes.py`, `_gradients.py`, `_products.py`: its parts
* `vocab.py`: log-probabilities of a few ids a token, and losses that are sums over tokens
* `groups.py`: groups of ids, which a token can list like an id
* `topk.py`, `sampled.py`: the most probable ids, and draws
* `divergence.py`: two models' whole distributions compared
* `bf16_reference.py`: the cross-entropy in bf16, for parity with a published search
"""
