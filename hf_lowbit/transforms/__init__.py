"""Changes of basis that leave a model's function as it is. :mod:`.hadamard` rotates what a layer reads."""
