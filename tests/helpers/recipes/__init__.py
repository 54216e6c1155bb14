"""The guard of the recipes: every stage run tiny on fixed inputs, and a digest of what it computes.

``training`` and ``drawing`` say what is run, ``inputs`` writes what stages read, ``digest`` sums up what they wrote,
``guard`` compares that with ``tests/golden/recipes.json``, and ``python -m helpers.recipes`` renews that file.
"""
