#!/bin/sh
# machine.sh ENVIRONMENT COMMAND ...: the command on a new machine of Colab, as far as this kernel's namespaces go.
#
# It sees this machine's files, beside them an empty /content and /kaggle, and changes the virtual environment in memory
# only. What it mounts nobody else sees, and all of that goes with it. No rights are needed but unprivileged namespaces.
set -eu
if [ "${COLAB_INSIDE:-}" != yes ]; then
    exec env COLAB_INSIDE=yes unshare --map-root-user --mount sh "$0" "$@"
fi
environment=$1
shift
mount -t tmpfs tmpfs /mnt
mkdir /mnt/root /mnt/over /mnt/over/upper /mnt/over/work
for path in /* /.[!.]*; do
    if [ -L "$path" ]; then
        cp -P "$path" "/mnt/root$path"
    elif [ -d "$path" ] && [ "$path" != /mnt ]; then
        mkdir "/mnt/root$path"
        mount --rbind "$path" "/mnt/root$path"
    fi
done
mkdir -p /mnt/root/content /mnt/root/kaggle/input /mnt/root/kaggle/working
mount -t overlay overlay -o "lowerdir=$environment,upperdir=/mnt/over/upper,workdir=/mnt/over/work" "/mnt/root$environment"
if [ -n "${KAGGLE_KERNEL_RUN_TYPE:-}" ]; then
    mount --bind "$COLAB_ACCOUNT/kaggle" /mnt/root/kaggle/input
    here=/kaggle/working
else
    here=/content
fi
exec chroot /mnt/root env -C "$here" PATH="$environment/bin:$PATH" "$@"
