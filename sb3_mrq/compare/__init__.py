"""
Comparisons of algorithms: the scripts ``compare`` and ``report`` of the command ``sb3-mrq``.
"""
