# hop's image: one static binary with its schema and seeds inside, no shell, not root.
# Settings come from the environment (docker run IMAGE -h lists them); DATABASE_URL is the one it needs.
FROM golang:1.26 AS build
WORKDIR /src
# The drivers first: this layer stays as long as go.mod does.
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# The name of the release that is built, if it is one.
ARG VERSION=
# CGO_ENABLED=0: no libc to link with in the final image.
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.release=$VERSION" -o /hop . && \
    mkdir /data

FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /hop /hop
# Clicks not yet in PostgreSQL. A new volume takes over this directory's owner: nonroot.
COPY --from=build --chown=nonroot:nonroot /data /data
ENV PORT=8080 DATA_DIR=/data
EXPOSE 8080
# Warming millions of links before being ready may take a while: that is what start-period is for.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["/hop", "health"]
ENTRYPOINT ["/hop"]
CMD ["serve"]
