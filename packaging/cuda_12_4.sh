#!/bin/sh
# Put the compiler of CUDA 12.4 into a folder, to build the CUDA module with the oldest version that we support.
#
#   sh packaging/cuda_12_4.sh FOLDER
#   PATH=FOLDER/bin:$PATH BCLIP_CUDA=1 pip install .
#
# It unpacks packages of Debian 13 (main and non-free, 1.0 GB of downloads) and installs nothing. It needs apt-get, dpkg and
# Debian's keys, on Debian or Ubuntu with glibc 2.34 or newer. The compiler takes g++ up to version 13.
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
work=$folder/download
mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/root" "$folder/nvvm"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] http://deb.debian.org/debian trixie main non-free" >"$work/sources.list"
cat >"$work/apt.conf" <<EOF
Dir::Etc::sourcelist "$work/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "$work/lists";
Dir::Cache "$work";
Dir::Cache::archives "$work/archives";
EOF
export APT_CONFIG="$work/apt.conf"
apt-get -q update
cd "$work/archives"
apt-get -q download nvidia-cuda-toolkit nvidia-cuda-dev libnvvm4 libcu++-dev libthrust-dev libcub-dev
for package in libcu++-dev libthrust-dev libcub-dev libnvvm4 nvidia-cuda-toolkit; do
  dpkg-deb -x "$package"_*.deb "$work/root"
done
# Of the libraries, the build needs only CUDA's runtime.
dpkg-deb --fsys-tarfile nvidia-cuda-dev_*.deb |
  tar -x -C "$work/root" --wildcards './usr/include*' '*libcudart*' '*libcudadevrt*'

# NVIDIA's layout, with a profile that names this folder instead of Debian's.
root=$work/root/usr
mkdir -p "$folder/bin" "$folder/lib64"
rm "$root/bin/nvcc" # a script that starts the program below
cp "$root"/bin/* "$root/lib/nvidia-cuda-toolkit/bin/nvcc" "$root/lib/nvidia-cuda-toolkit/bin/cicc" "$folder/bin"
cp -a "$root"/lib/x86_64-linux-gnu/libcuda[rd]* "$folder/lib64"
cp -r "$root/lib/nvidia-cuda-toolkit/libdevice" "$folder/nvvm"
cp -r "$root/include" "$folder"
# crt/link.stub and the like.
cp -r "$root/lib/nvidia-cuda-toolkit/bin/crt" "$folder/bin"
cat >"$folder/bin/nvcc.profile" <<'EOF'
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
EOF
rm -rf "$work"
"$folder/bin/nvcc" --version
