# A bundle on a Jetson with JetPack 5 or 6, in NVIDIA's container of that JetPack. No board has built or run it yet.
#
#     docker build -f examples/docker/l4t.Dockerfile --build-arg L4T=r36.4.0 -t mnif BUNDLE
#
# L4T is r35.2.1 for JetPack 5.1, r36.3.0 for 6.0, r36.4.0 for 6.1 and 6.2.
ARG L4T=r36.4.0
FROM nvcr.io/nvidia/l4t-jetpack:${L4T}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-numpy python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /bundle
COPY manifest.json README.md reference.npz ./
COPY onnx onnx
COPY device device

# Plans are built where they run, and sealed with a key of this user: both outlive a container in volumes.
RUN useradd --create-home --groups video mnif && mkdir engines /state && chown mnif engines /state
ENV MNIF_STATE=/state PYTHONDONTWRITEBYTECODE=1
VOLUME ["/bundle/engines", "/state"]
USER mnif
ENTRYPOINT ["python3"]
CMD ["device/verify.py"]
