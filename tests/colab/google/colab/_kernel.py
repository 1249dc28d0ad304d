"""The kernel imports the package before the first cell, and its shell's name tells libraries where they are."""

import google.colab  # noqa: F401
from google.colab._shell import Shell
from ipykernel.ipkernel import IPythonKernel


class Kernel(IPythonKernel):
    shell_class = Shell
