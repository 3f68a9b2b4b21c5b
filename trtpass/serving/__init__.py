"""Serving an engine: rows that join and leave a batch, requests, and the models that Triton loads.

Everything here runs inside the server's model process, on what a serving machine has: numpy, onnx, ONNX Runtime and
tokenizers. What starts a server and talks to it is ``trtpass.server``; ``trtpass.deploy`` writes model repositories.
"""
