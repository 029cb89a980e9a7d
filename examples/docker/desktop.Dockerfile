# A bundle on a desktop GPU, or on a Jetson with JetPack 7, in NVIDIA's TensorRT container. Nothing has built or run it
# yet.
#
#     docker build -f examples/docker/desktop.Dockerfile --build-arg TENSORRT=25.09-py3 -t mnif BUNDLE
#
# The tag chooses the TensorRT: 24.08-py3 has 10.3, 25.09-py3 has 10.13. On a Jetson take that of its JetPack.
ARG TENSORRT=25.09-py3
FROM nvcr.io/nvidia/tensorrt:${TENSORRT}

RUN pip install --no-cache-dir numpy

WORKDIR /bundle
COPY manifest.json README.md reference.npz ./
COPY onnx onnx
COPY device device

# Plans are built where they run, and sealed with a key of this user: both outlive a container in volumes.
RUN useradd --create-home mnif && mkdir engines /state && chown mnif engines /state
ENV MNIF_STATE=/state PYTHONDONTWRITEBYTECODE=1
VOLUME ["/bundle/engines", "/state"]
USER mnif
ENTRYPOINT ["python3"]
CMD ["device/verify.py"]
