#!/bin/sh
# Build a static libjpeg-turbo for the wheels: sh packaging/libjpeg_turbo.sh PREFIX [FOLDER OF ITS SOURCES]
# Without the second argument, the sources are downloaded and their checksum is compared.
set -eu
VERSION=3.1.2
SHA256=8f0012234b464ce50890c490f18194f913a7b1f4e6a03d6644179fa0f867d0cf
prefix=$1
sources=${2:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "$sources" ]; then
  archive="$work/libjpeg-turbo.tar.gz"
  curl -fsSL --retry 5 -o "$archive" \
    "https://github.com/libjpeg-turbo/libjpeg-turbo/releases/download/$VERSION/libjpeg-turbo-$VERSION.tar.gz"
  echo "$SHA256  $archive" | sha256sum -c -
  tar -xzf "$archive" -C "$work"
  sources="$work/libjpeg-turbo-$VERSION"
fi
# On x86-64, the assembler of its vector code. Without it, decoding takes several times as long.
if [ "$(uname -m)" = x86_64 ] && ! command -v nasm >/dev/null; then
  dnf install -y nasm
fi
cmake -S "$sources" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_POSITION_INDEPENDENT_CODE=ON \
  -DCMAKE_INSTALL_PREFIX="$prefix" -DCMAKE_INSTALL_LIBDIR=lib -DENABLE_SHARED=OFF -DENABLE_STATIC=ON \
  -DREQUIRE_SIMD=ON -DWITH_TURBOJPEG=OFF -DWITH_JPEG8=ON
cmake --build "$work/build" --parallel "$(nproc)"
cmake --install "$work/build"
