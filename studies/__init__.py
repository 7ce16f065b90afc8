"""Does sharing improve accuracy? Each study is a module, run from the repository's root: `python -m studies.NAME`."""
