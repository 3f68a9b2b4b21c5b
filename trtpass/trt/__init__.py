"""The target ``tensorrt``: plans that hold our own kernels, from the operators' declarations."""
