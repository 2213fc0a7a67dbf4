"Everything that setuptools needs is read from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_namespace_packages, setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).parent / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_path']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license=cfg['license'],
    url=cfg['git_url'],
    package_dir={'': '.'},  # says that all packages lie here, so an editable install is a line in a .pth file
    packages=find_namespace_packages(include=[lib, f'{lib}.*']),
    package_data={lib: cfg['package_data'].split()},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'site', 'export')},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Education',
                 'Natural Language :: English', 'Programming Language :: Python :: 3'],
    zip_safe=False,
)
