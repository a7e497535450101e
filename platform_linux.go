package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// What only Linux gives: a click journal that survives the process, and a port shared by the old and the new one.

// journalFile is a memory-mapped file, locked to one process at a time.
type journalFile struct {
	file *os.File
	mem  []byte
}

// openJournals maps every journal in dir that no other process holds, of size bytes each, at least one. All but the first were
// left by processes that died: a replica that is gone for good must not take its clicks along.
func openJournals(dir string, size int) (files []*journalFile, err error) {
	if dir == "" {
		return nil, errors.New("no DATA_DIR")
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, err
	}
	for n := 0; ; n++ {
		name := filepath.Join(dir, fmt.Sprintf("clicks-%d.journal", n))
		if _, err := os.Stat(name); err != nil && len(files) > 0 {
			return files, nil
		}
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o640)
		if err != nil {
			return files, err
		}
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
			f.Close()
			continue
		}
		mem, err := mapFile(f, size)
		if err != nil {
			f.Close()
			return files, err
		}
		files = append(files, &journalFile{f, mem})
	}
}

// mapFile reserves size bytes on disk for f and maps them. Fallocate, not Truncate: on a full disk a write into a hole of a
// mapped file is a SIGBUS.
func mapFile(f *os.File, size int) ([]byte, error) {
	if err := syscall.Fallocate(int(f.Fd()), 0, 0, int64(size)); err != nil {
		return nil, fmt.Errorf("reserving %d MiB: %w", size>>20, err)
	}
	return syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
}

// close unmaps the file and lets another process have it.
func (j *journalFile) close() { syscall.Munmap(j.mem); j.file.Close() }

// bootID tells one run of the kernel from another: 36 bytes.
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(append(id, make([]byte, 36)...)[:36])
}

// sharePort lets a new process listen on a port before the old one has left it: a restart without a refused connection.
func sharePort(_, _ string, c syscall.RawConn) (err error) {
	const soReusePort = 15 // not in package syscall on every architecture
	ctlErr := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, soReusePort, 1) })
	return errors.Join(ctlErr, err)
}
