//go:build !linux

package main

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// Elsewhere than on Linux clicks are counted from memory, and a restart may refuse a connection.
// What each function is for stands in platform_linux.go.

var errNeedsLinux = errors.New("click journals need Linux")

func checkFileSystem(string) error { return errNeedsLinux }

func lockFile(*os.File) (bool, error) { return false, errNeedsLinux }

func unlockFile(*os.File) {}

func mapFile(*os.File, int) ([]byte, error) { return nil, errNeedsLinux }

func unmapFile([]byte) {}

func touchPages([]byte, int64, int64) {}

func freeSpace(*os.File, int64, int64) error { return nil }

func sharePort(_, _ string, _ syscall.RawConn) error { return nil }

func holdName(string) (io.Closer, error) { return io.NopCloser(nil), nil }

func heldNames(string) ([]string, error) { return nil, nil }

func connDead(net.Conn) bool { return false }
