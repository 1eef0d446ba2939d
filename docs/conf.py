"""Sphinx settings: `pip install "unimed-jax[docs]" && sphinx-build docs docs/_build`."""

project = "unimed_jax"
author = "The unimed_jax authors"
extensions = ["myst_nb"]
html_theme = "sphinx_book_theme"
html_title = "unimed_jax"
exclude_patterns = ["_build"]
nb_execution_mode = "off"
