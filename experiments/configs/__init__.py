"""Config files: each has get_config(), and a docstring with its command, its time and the number to expect."""
