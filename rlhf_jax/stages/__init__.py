"""What one run of each stage is: ``Config``, the pure objective, and ``run(config, workdir, ...)``."""
