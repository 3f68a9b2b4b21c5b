"""A Triton Inference Server on this machine: starting it, watching it, asking it.

``make setup`` installs one into ``.venv-serve``. What runs inside its model processes is ``trtpass.serving``.
"""
