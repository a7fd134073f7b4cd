"""Sphinx's settings. Build: python -m sphinx -W -b html docs docs/_build"""

from importlib import metadata

project = "dist_train"
author = "the dist_train authors"
release = metadata.version("dist-train")
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

highlight_language = "none"
pygments_dark_style = "github-dark"
smartquotes = False
default_role = "code"
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "dist_train"
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]
