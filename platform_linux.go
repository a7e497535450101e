package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
)

// What only Linux gives: click journals that outlive their process, a port that the old and the new
// process share during a restart, names by which such processes find each other, and a look at an
// idle connection.

// trustedFileSystems are those on which a mapped file is safe. On them the space that Fallocate
// reserves is the space that a write goes to, so a disk that fills up later takes nothing away. A
// file system that copies on writing (btrfs, zfs) needs new space for every write, and one on a
// network loses its server: there a write to the map can be a SIGBUS, which ends the process.
var trustedFileSystems = map[uint32]bool{
	0xEF53:     true, // ext2, ext3, ext4
	0x58465342: true, // xfs
	0x01021994: true, // tmpfs
	0x794c7630: true, // overlayfs, a container's own files; it does not tell what is below it
}

// checkFileSystem returns an error if files in dir cannot be trusted under a map.
func checkFileSystem(dir string) error {
	var stat syscall.Statfs_t
	if err := syscall.Statfs(dir, &stat); err != nil {
		return &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	kind := uint32(stat.Type)
	if !trustedFileSystems[kind] {
		return fmt.Errorf("%s is not on ext4, xfs, tmpfs or overlayfs but on a file system (0x%x) "+
			"where a full disk could end hop", dir, kind)
	}
	return nil
}

// lockFile makes f this process's own until unlockFile or its end. It says false if another process
// holds it, and returns an error if the file system has no locks.
func lockFile(f *os.File) (bool, error) {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == syscall.EWOULDBLOCK {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "flock", Path: f.Name(), Err: err}
	}
	return true, nil
}

// unlockFile lets other processes have f. Closing it is not enough while it is mapped.
func unlockFile(f *os.File) { syscall.Flock(int(f.Fd()), syscall.LOCK_UN) }

// mapFile reserves size bytes on disk for f and maps them. Fallocate, not Truncate: on a full disk
// a write into a hole of a mapped file is a SIGBUS.
func mapFile(f *os.File, size int) ([]byte, error) {
	if err := syscall.Fallocate(int(f.Fd()), 0, 0, int64(size)); err != nil {
		return nil, fmt.Errorf("reserving %d MiB for %s: %w", size>>20, f.Name(), err)
	}
	const readWrite = syscall.PROT_READ | syscall.PROT_WRITE
	return syscall.Mmap(int(f.Fd()), 0, size, readWrite, syscall.MAP_SHARED)
}

// unmapFile undoes mapFile.
func unmapFile(mem []byte) { syscall.Munmap(mem) }

// touchPages makes the pages of a map that hold its bytes from up to to ready to be written.
// Otherwise the first write to each takes some 10 µs, and longer if the disk is busy. A kernel
// before 5.14 cannot do it, which is no harm.
func touchPages(mem []byte, from, to int64) {
	const populateWrite = 23 // MADV_POPULATE_WRITE, which package syscall does not know
	from -= from % int64(os.Getpagesize())
	syscall.Madvise(mem[from:to], populateWrite)
}

// freeSpace gives the disk space of f from byte from up to byte to back. They read as zeros then.
func freeSpace(f *os.File, from, to int64) error {
	const keepSize, punchHole = 1, 2
	return syscall.Fallocate(int(f.Fd()), keepSize|punchHole, from, to-from)
}

// sharePort lets a new process listen on a port before the old one has left it: a restart without
// a refused connection. It is a net.ListenConfig's Control.
func sharePort(_, _ string, c syscall.RawConn) error {
	const soReusePort = 15 // not in package syscall on every architecture
	var failed error
	err := c.Control(func(fd uintptr) {
		failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, soReusePort, 1)
	})
	return errors.Join(err, failed)
}

// holdName makes a name visible to other processes until it is closed or this process ends, however
// it ends. The name is an abstract Unix socket: it is in no file system, and those who see it are
// those who can share a port, since both belong to one network namespace.
func holdName(name string) (io.Closer, error) { return net.Listen("unix", "@"+name) }

// heldNames lists the names with a prefix that processes hold, this one's own among them.
func heldNames(prefix string) ([]string, error) {
	sockets, err := os.ReadFile("/proc/self/net/unix")
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(sockets)) {
		_, name, found := strings.Cut(strings.TrimSpace(line), " @")
		if found && strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

// connDead says whether the peer has closed an idle TCP connection or sent something that nobody
// asked for, which a server does before it closes. It never waits. It says false for a connection
// that is no socket itself, such as TLS: pass what is below.
func connDead(c net.Conn) bool {
	socket, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return true
	}
	var peeked error
	err = raw.Control(func(fd uintptr) { // not Read, which heeds a deadline that has passed
		var one [1]byte
		_, _, peeked = syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	quiet := peeked == syscall.EAGAIN || peeked == syscall.EINTR
	return err != nil || !quiet
}
