"""Writing model repositories of Triton Inference Server from engines: see ``trtpass.deploy.repository.deploy``."""
