"""The commands of ``ddops``, one a file: ``register`` declares the arguments, ``run`` does the work.

What is slow to load (torch) is imported where it is used, so that help and errors in arguments show at once.
"""
