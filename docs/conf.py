"Sphinx's settings. The sources that it reads are written by build.py into _docs/source."
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(here.parent / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

project, author, copyright, version = cfg["title"], cfg["author"], cfg["copyright"], cfg["version"]
release = version
extensions = ["myst_nb", "sphinx_copybutton"]

# Notebooks: build.py has run what had to be run
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_image_options = {"align": "left"}
nb_ipywidgets_js = {"vendor/widgets/embed.js": {}}     # not fetched from a network

# Prose
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4
myst_dmath_allow_labels = False                         # "$$ ... $$ (2)" is an equation and a number that the author wrote
myst_dmath_double_inline = True
suppress_warnings = ["mystnb.unknown_mime_type"]
highlight_language = "python"
pygments_style, pygments_dark_style = "tango", "monokai"
smartquotes = False

# Reference
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
add_module_names = False
toc_object_entries = False

# HTML that opens from a folder, without a server and without a network
html_theme = "furo"
html_title = project
html_favicon = "static/logo.svg"
html_static_path = ["static"]                           # and what npm gave, which build.py adds
html_css_files = ["site.css"]
html_js_files = [("formulas.js", {"defer": "defer", "priority": 900})]      # after MathJax, before the widgets draw
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False                        # a summary is fetched, which a browser refuses to a page from a folder
html_theme_options = {"light_logo": "logo.svg", "dark_logo": "logo.svg", "navigation_with_keys": True}
mathjax_path = "vendor/mathjax/tex-svg.js"
mathjax3_config = {"svg": {"fontCache": "local"}, "options": {"enableMenu": False}}
