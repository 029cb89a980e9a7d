#!/usr/bin/env bash
# Lays out onnxruntime/ beside this file from packages: the library of the Python wheel, and the headers of Debian's or
# Ubuntu's libonnxruntime-dev; a Debian before 13 takes them from 13's archive. Headers may be older than the library:
# it answers for every earlier version of its interface. Nothing is installed.
#
#     PYTHON=.venv/bin/python bash examples/cpp/get_onnxruntime.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)/onnxruntime
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

library=$("${PYTHON:-python3}" -c 'import glob, importlib.util, os
folder = importlib.util.find_spec("onnxruntime").submodule_search_locations[0]
print(glob.glob(os.path.join(folder, "capi", "libonnxruntime.so.*"))[0])')

of_debian_13() {
    local keys=/usr/share/keyrings/debian-archive-keyring.gpg mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/$')
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    echo "deb [signed-by=$keys] $mirror trixie main" >"$work/sources"
    local apt=(apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist="$work/sources"
        -o Dir::Etc::sourceparts=- -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache")
    "${apt[@]}" update && "${apt[@]}" download libonnxruntime-dev
}

cd "$work"
apt-get -qq download libonnxruntime-dev 2>/dev/null || of_debian_13
dpkg-deb -x ./libonnxruntime-dev_*.deb package
rm -rf "$here"
mkdir -p "$here/lib"
cp -r package/usr/include/onnxruntime "$here/include"
ln -s "$library" "$here/lib/libonnxruntime.so"
ln -s "$library" "$here/lib/libonnxruntime.so.1"
echo "$here: ${library##*/}"
