"Settings of the site for Sphinx. `build.py` writes the pages that it reads."
import configparser
from pathlib import Path

config = configparser.ConfigParser(delimiters=['='])
config.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

project, author, copyright, release = cfg['title'], cfg['author'], cfg['copyright'], cfg['version']
extensions = ['myst_nb', 'sphinx.ext.mathjax']
nb_execution_mode = 'off'  # outputs as they are stored
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_block']
myst_heading_anchors = 4
myst_heading_slug_func = 'anchors.slug'  # the anchors of JupyterLab, which the notebooks link to
mathjax_path = 'tex-svg.js'
html_theme = 'sphinx_book_theme'
html_static_path = ['_static']
html_css_files = ['site.css']
html_title = cfg['title']
html_show_sourcelink = False
html_use_index = False
html_favicon = '_static/favicon.svg'
html_context = dict(default_mode='auto')
html_theme_options = dict(
    repository_url=cfg['git_url'], repository_branch=cfg['branch'], path_to_docs=cfg['nbs_path'],
    use_repository_button=True, use_download_button=True, use_fullscreen_button=False, home_page_in_toc=True,
    launch_buttons=dict(colab_url='https://colab.research.google.com'), show_toc_level=2, navbar_persistent=[],
    pygments_light_style='a11y-high-contrast-light', pygments_dark_style='a11y-high-contrast-dark')
