"""``ModelBased``: what turns an off-policy algorithm of SB3 into a model-based one."""
