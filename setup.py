"Reads everything from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

c = ConfigParser(delimiters=['='])
c.read('settings.ini', encoding='utf-8')
c = c['DEFAULT']


def lines(key): return [x.strip() for x in c.get(key, '').splitlines() if x.strip()]


setup(
    name=c['lib_name'].replace('_', '-'), version=c['version'], description=c['description'],
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else '',
    long_description_content_type='text/markdown',
    author=c['author'], author_email=c['author_email'], license='Apache-2.0',
    packages=find_packages(include=[c['lib_path'], f"{c['lib_path']}.*"]),
    package_data={'': ['*.yaml', 'lmms_eval/*']}, python_requires=f">={c['min_python']}",
    install_requires=lines('requirements'), extras_require={'dev': lines('dev_requirements')},
    entry_points={'console_scripts': lines('console_scripts'),
                  'nbdev': [f"{c['lib_path']} = {c['lib_path']}._modidx:d"]},
    zip_safe=False,
)
