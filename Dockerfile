# fedkd on CPUs, with the versions of constraints.txt: docker build -t fedkd . (docs/docker.md)
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 UV_LINK_MODE=copy UV_NO_CACHE=1
WORKDIR /opt/fedkd

# Libraries first, since they change less often than the code; PyTorch without CUDA.
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY fedkd/__init__.py fedkd/
RUN pip install --no-cache-dir -c constraints.txt uv \
    && uv pip install --system --torch-backend=cpu -c constraints.txt '.[export,serve]'

COPY fedkd fedkd
# Any user may write to the folder of the runs, and to the cache.
RUN uv pip install --system --no-deps --reinstall-package fedkd . \
    && install -d -m 1777 /srv/fedkd /cache

USER 1000:1000
WORKDIR /srv/fedkd
ENV HOME=/cache FEDKD_CACHE=/cache/fedkd
ENTRYPOINT ["fedkd"]
CMD ["--help"]
