from ipykernel.zmqshell import ZMQInteractiveShell


class Shell(ZMQInteractiveShell):
    """str(get_ipython()) has google.colab in it."""
