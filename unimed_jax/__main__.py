"""`python -m unimed_jax` is the `unimed-jax` command."""

from unimed_jax.cli.main import main

if __name__ == "__main__":
    main()
