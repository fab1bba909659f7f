"""What is done to weights before codes are chosen, and leaves a model's function as it is, or nearly so.

:mod:`.hadamard` rotates what a layer reads, :mod:`.magr` makes the largest weights smaller.
"""
