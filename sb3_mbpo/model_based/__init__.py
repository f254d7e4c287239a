"""``ModelBased``: a mixin that makes an off-policy algorithm of SB3 model-based."""
