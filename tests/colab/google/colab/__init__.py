"""A stand-in for Colab's own package: the names, messages and exceptions that notebooks meet.

The machine around it (colab_notebooks.py) puts what a person's account holds into a folder, which COLAB_ACCOUNT names:

    MyDrive/        the Drive
    secrets.json    {name: {"payload": str, "access": bool}}
    browser/        what was downloaded
    refuse          if it is there, the person refuses the Drive
"""

from google.colab import drive, errors, files, userdata

__all__ = ["drive", "errors", "files", "userdata"]
