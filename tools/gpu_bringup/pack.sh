# gpu_bringup pack: builds for Hopper, checks what can be checked without a card, and gathers programs and libraries.

limit_mib=55  # some places take no more of what travels with a checkout

pack() {
  local dir=${build:-build-cuda} begin=$SECONDS program lib high size
  [ "$device" = cpu ] || build_for_hopper "$dir"
  echo "== pack $dir into $packed"
  local tree=$work/pack
  [ -e "$dir/moegraft" ] || die "no $dir/moegraft: build it first"
  mkdir -p "$packed" 2>/dev/null && [ -w "$packed" ] || die "--packed $packed: cannot write there"
  rm -rf "$tree"
  mkdir -p "$tree/bin" "$tree/lib"
  for program in moegraft $programs; do
    program=$([ "$program" = moegraft ] && echo "$dir/moegraft" || echo "$dir/tests/$program")
    [ -e "$program" ] || { [ "$device" = cpu ] || die "no $program: build it first"; echo "   $program is not built: left out"; continue; }
    strip -o "$tree/bin/$(basename "$program")" "$program"
  done
  # Everything but torch's own, the C library's and the compiler's, which a machine with torch has.
  ldd "$tree"/bin/* | sed -nE 's/.* => (\/[^ ]+) .*/\1/p' | sort -u | grep -v -E '/torch/|/nvidia/|/(libc|libm|libpthread|libdl|librt|libresolv|libstdc\+\+|libgcc_s|ld-linux[^/]*)\.so' |
    while read -r lib; do cp -L "$lib" "$tree/lib/"; done
  git rev-parse HEAD >"$tree/commit" 2>/dev/null || echo unknown >"$tree/commit"
  [ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || sed -i 's/$/ with changes/' "$tree/commit"
  high=$(for lib in "$tree"/bin/* "$tree"/lib/*; do objdump -T "$lib" 2>/dev/null | grep -oE 'GLIBC_[0-9.]+' || true; done | sort -uV | tail -n 1)
  echo "${high#GLIBC_}" >"$tree/glibc"
  tar c -C "$tree" . | gzip "$([ "$device" = cuda ] && echo -6 || echo -1)" >"$packed/packed.tar.gz.new"
  mv "$packed/packed.tar.gz.new" "$packed/packed.tar.gz"
  rm -rf "$tree" "$work/packed"
  if [ "$device" = cuda ]; then
    stage=pack results=$out/pack
    mkdir -p "$results"
    prepare
    gates "$dir"
  fi
  size=$(($(stat -c %s "$packed/packed.tar.gz") >> 20))
  echo "pack: $packed/packed.tar.gz, $size MiB, in $((SECONDS - begin)) s; needs glibc ${high#GLIBC_}"
  [ "$device" = cpu ] || [ $size -le $limit_mib ] || die "gate: more than $limit_mib MiB"
}

build_for_hopper() {
  command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || ls .venv/lib/python3*/site-packages/nvidia/cu*/bin/nvcc >/dev/null 2>&1 || die "pack needs nvcc 13 (tools/setup.sh --cuda installs one)"
  echo "== build $1 for sm_90"
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} cmake --preset cuda -B "$1" -DMOEGRAFT_ARROW_ROOT=OFF >"$out/configure.log" || { cat "$out/configure.log" >&2; die "configuring failed"; }
  ! grep -q '^MOEGRAFT_NCCL_INCLUDE:.*NOTFOUND' "$1/CMakeCache.txt" || die "nccl.h was not found, and the stages try several processes: tools/setup.sh --cuda brings it"
  ! grep -q '^MOEGRAFT_CUDNN_FRONTEND_INCLUDE:.*NOTFOUND' "$1/CMakeCache.txt" || echo "   cudnn_frontend.h was not found: cuDNN's attention is not built and will not be compared (tools/setup.sh --cuda)"
  # shellcheck disable=SC2086
  cmake --build "$1" --target moegraft $programs
}

gates() {
  local program
  echo "== gates"
  ctest --test-dir "$1" -R '^cuda_ptx$' --no-tests=error --output-on-failure >"$results/ptx.log" || die "gate: nvcc's code spills registers or moves narrow words; see $results/ptx.log"
  if command -v cuobjdump >/dev/null; then cuobjdump --list-elf "$1/moegraft" | grep -q sm_90 || die "gate: no sm_90 code in $1/moegraft"
  else echo "   cuobjdump is not here: which architectures the code is for is not checked"; fi
  nvidia-smi -L 2>/dev/null | grep -q GPU && { echo "   a GPU is here: the gates that expect none are left out"; return; }
  for program in $programs; do
    "$wrapped/$program" --gtest_filter="$gpu_tests" --gtest_brief=1 >"$results/$program.log" 2>&1 || die "gate: GPU tests of $program must skip without a GPU; see $results/$program.log"
  done
  for program in test_kernels test_model; do
    "$wrapped/$program" --gtest_filter='-*Cuda*:*Nccl*:*Pinned*' --gtest_brief=1 >"$results/$program-cpu.log" 2>&1 || die "gate: CPU tests of $program fail in the CUDA build; see $results/$program-cpu.log"
  done
  echo "   GPU tests skip, CPU tests of kernels and model pass, nvcc's code is as wanted"
}
