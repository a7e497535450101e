package main

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"unsafe"
)

// A journal is where clicks wait until PostgreSQL has counted them: a file that is mapped into
// memory, so that writing a click needs no system call and the kernel keeps it when the process is
// killed.
//
// The clicks of a journal are numbered 1, 2, 3 and so on. The file is a ring of slots, and click n
// sits in slot n modulo their number. The number is written last, after the click: a slot that
// holds the expected number is whole. So nothing is ever blanked, and a slot of an earlier lap
// cannot be mistaken.
//
// One process writes a journal, from making the file to its own end. Later processes only count
// what it left and remove the file. A number therefore means the same click for ever, also in a
// copy of the file, and PostgreSQL's word on how far a journal is counted holds for all of them.

const (
	journalSlots = 1 << 19 // 32 MiB: what is clicked in 20 s at the full speed of one machine
	slotSize     = 64      // one cache line
	headerSize   = 4096    // one page
	journalSize  = headerSize + journalSlots*slotSize
	maxJournals  = 256 // files in one directory: 8 GiB
)

// A slot holds a click: its number, which makes it whole; a word of the second (bits 0 to 31), the
// length of the host (32 to 39) and whether a bot clicked (40); the link; the referrer's host.
const (
	slotNumber = 0
	slotWord   = 8
	slotLink   = 16
	slotHost   = 24

	wordHost = 32
	wordBot  = 1 << 40
)

// The header says whose clicks these are. All numbers in the file are little-endian; texts end at
// the first zero byte.
const (
	headerMagic    = 0  // journalMagic
	headerCounted  = 16 // number of the first click that is not known to be counted
	headerID       = 24 // what click_journals knows the journal by
	headerDatabase = 56 // id of the database that the clicks belong to; "" until that was known
	headerEnd      = 120
)

// journalMagic names the format and its version.
const journalMagic = "hop clicks 2 64\n"

// The seconds that a click may have: from 2020-01-01 up to 2100-01-01, which fits 32 bits.
const (
	firstSecond = 1_577_836_800
	lastSecond  = 4_102_444_799
)

var (
	errJournalHeld    = errors.New("another process has the journal")
	errJournalUnknown = errors.New("not a click journal of this release, or damaged")
)

// journal is a click journal. It has no locks of its own: see clickLog.
type journal struct {
	file     *os.File // locked by this process; nil is a journal in memory only
	mem      []byte   // header and slots, to write to; nil if a process left it and it is only read
	id       string
	database string
	counted  int64 // number of the first click not known to be counted
}

// journalPath is the file of journal n in dir.
func journalPath(dir string, n int) string {
	return filepath.Join(dir, fmt.Sprintf("clicks-%d.ring", n))
}

// oldJournalPath is the file of journal n in dir of the first release, which cannot be read here.
func oldJournalPath(dir string, n int) string {
	return filepath.Join(dir, fmt.Sprintf("clicks-%d.journal", n))
}

// memoryJournal is a journal that ends with its process.
func memoryJournal() *journal {
	return &journal{mem: make([]byte, journalSize), id: rand.Text(), counted: 1}
}

// createJournal makes a new journal in dir, under the first name that is free.
func createJournal(dir string) (*journal, error) {
	if dir == "" {
		return nil, errors.New("DATA_DIR is not set")
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, err
	}
	if err := checkFileSystem(dir); err != nil {
		return nil, err
	}
	for n := range maxJournals {
		j, err := createJournalFile(journalPath(dir, n))
		if errors.Is(err, fs.ErrExist) || errors.Is(err, errJournalHeld) {
			continue
		}
		return j, err
	}
	return nil, fmt.Errorf("there are %d click journals in %s already", maxJournals, dir)
}

// createJournalFile makes a journal at path, where no file may be.
func createJournalFile(path string) (*journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return nil, err
	}
	j := &journal{file: f, id: rand.Text(), counted: 1}
	if err := j.lock(); err != nil {
		if !errors.Is(err, errJournalHeld) {
			os.Remove(path)
		}
		f.Close()
		return nil, err
	}
	j.mem, err = mapFile(f, journalSize)
	if err == nil {
		_, err = f.WriteAt(j.header(), 0)
	}
	if err != nil {
		j.unmap()
		j.remove()
		return nil, err
	}
	return j, nil
}

// openLeftJournal opens a journal that a dead process left at path. The error is errJournalHeld
// if a process lives that has it, fs.ErrNotExist if there is none, and errJournalUnknown if it
// cannot be read as a journal. It removes a file whose process died while making it.
func openLeftJournal(path string) (*journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	j := &journal{file: f}
	err = j.lock()
	if err == nil {
		err = j.readHeader()
	}
	if errors.Is(err, fs.ErrNotExist) {
		j.remove()
		return nil, err
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return j, nil
}

// lock makes the file this process's own, or returns errJournalHeld. Whoever had the lock before
// may have removed the file meanwhile, and another may have its name: that is held as well.
func (j *journal) lock() error {
	held, err := lockFile(j.file)
	if err != nil {
		return err
	}
	if !held || !j.named() {
		return errJournalHeld
	}
	return nil
}

// named says whether the file that this journal has open is still the one under its name.
func (j *journal) named() bool {
	mine, err := j.file.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(j.file.Name())
	return err == nil && os.SameFile(mine, there)
}

// name is the journal's file, for people.
func (j *journal) name() string {
	if j.file == nil {
		return "memory"
	}
	return j.file.Name()
}

// close lets go of the file, for another process to count it. The mapped memory stays: a click may
// still be on its way to it.
func (j *journal) close() {
	unlockFile(j.file)
	j.file.Close()
}

// unmap gives the room on the disk back that a removed file keeps while it is mapped. Nobody may
// write a click any more.
func (j *journal) unmap() {
	if j.mem != nil {
		unmapFile(j.mem)
		j.mem = nil
	}
}

// remove deletes the file and lets go of it.
func (j *journal) remove() {
	if j.named() {
		os.Remove(j.file.Name())
	}
	j.close()
}

// header is the file's header as it has to be.
func (j *journal) header() []byte {
	h := make([]byte, headerEnd)
	copy(h[headerMagic:], journalMagic)
	binary.LittleEndian.PutUint64(h[headerCounted:], uint64(j.counted))
	copy(h[headerID:headerDatabase], j.id)
	copy(h[headerDatabase:headerEnd], j.database)
	return h
}

// readHeader reads what the file's header says. The error is fs.ErrNotExist if nothing was written
// yet: then the file holds no click.
func (j *journal) readHeader() error {
	h := make([]byte, headerEnd)
	if _, err := j.file.ReadAt(h, 0); err != nil && err != io.EOF {
		return err
	}
	if bytes.Equal(h, make([]byte, headerEnd)) {
		return fs.ErrNotExist
	}
	if string(h[:headerCounted]) != journalMagic {
		return errJournalUnknown
	}
	j.counted = int64(binary.LittleEndian.Uint64(h[headerCounted:]))
	id, idOK := headerText(h[headerID:headerDatabase])
	database, databaseOK := headerText(h[headerDatabase:headerEnd])
	countedOK := j.counted >= 1 && j.counted < 1<<62
	if !countedOK || id == "" || !idOK || !databaseOK {
		return errJournalUnknown
	}
	j.id = id
	j.database = database
	return nil
}

// headerText reads a text of the header. It says false for bytes that hop never writes there.
func headerText(field []byte) (string, bool) {
	text, _, _ := bytes.Cut(field, []byte{0})
	for _, c := range text {
		if c <= ' ' || c >= 0x7f {
			return "", false
		}
	}
	return string(text), true
}

// The header is written by a system call, not through the map: a goroutine that waits for the disk
// in a system call holds up no other.

// setCounted notes that all clicks below number n are counted.
func (j *journal) setCounted(n int64) error {
	if j.file == nil {
		return nil
	}
	_, err := j.file.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(n)), headerCounted)
	return err
}

// setDatabase notes which database the clicks belong to.
func (j *journal) setDatabase(id string) error {
	before := j.database
	j.database = id
	err := j.writeHeader()
	if err != nil {
		j.database = before // it is tried again
	}
	return err
}

// renew gives the journal another id, under which PostgreSQL has counted nothing.
func (j *journal) renew() error {
	before := j.id
	j.id = rand.Text()
	err := j.writeHeader()
	if err != nil {
		j.id = before
	}
	return err
}

// writeHeader writes id and database.
func (j *journal) writeHeader() error {
	if j.file == nil {
		return nil
	}
	_, err := j.file.WriteAt(j.header()[headerID:], headerID)
	return err
}

// slotOffset is where in the file click n sits.
func slotOffset(n int64) int64 {
	return headerSize + int64(uint64(n)%journalSlots)*slotSize
}

// write writes click n. Its slot must not hold a click that still has to be counted.
func (j *journal) write(n, linkID, second int64, bot bool, referrer string) {
	slot := j.mem[slotOffset(n):][:slotSize]
	length := copy(slot[slotHost:], referrer)
	word := uint64(second) | uint64(length)<<wordHost
	if bot {
		word |= wordBot
	}
	binary.LittleEndian.PutUint64(slot[slotWord:], word)
	binary.LittleEndian.PutUint64(slot[slotLink:], uint64(linkID))
	numberOf(slot).Store(uint64(n))
}

// takeOver copies the clicks that other has not counted, up to its number next, and returns the
// number after the last. j must be new.
func (j *journal) takeOver(other *journal, next int64) int64 {
	n := j.counted
	for at := other.counted; at < next; at++ {
		click, host, ok := readSlot(other.mem[slotOffset(at):][:slotSize], at)
		if !ok {
			continue
		}
		j.write(n, click.linkID, click.second, click.bot, string(host))
		n++
	}
	return n
}

// prepare makes the pages ready that clicks from number from up to number to will be written to.
func (j *journal) prepare(from, to int64) {
	if j.file == nil || from >= to {
		return
	}
	start := slotOffset(from)
	end := slotOffset(to-1) + slotSize
	if start < end {
		touchPages(j.mem, start, end)
	} else {
		touchPages(j.mem, start, journalSize)
		touchPages(j.mem, headerSize, end)
	}
}

// numberOf is the number of a slot. It is atomic for the sake of order: the click stands in memory
// before its number does.
func numberOf(slot []byte) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&slot[slotNumber]))
}

// slot returns the slot of click n as it is, in buf if it has to be read from the file. Where the
// file is too short the slot is blank.
func (j *journal) slot(n int64, buf *[slotSize]byte) ([]byte, error) {
	if j.mem != nil {
		return j.mem[slotOffset(n):][:slotSize], nil
	}
	clear(buf[:])
	if _, err := j.file.ReadAt(buf[:], slotOffset(n)); err != nil && err != io.EOF {
		return nil, err
	}
	return buf[:], nil
}

// readSlot reads click n out of its slot. It says false if that does not hold click n, or a click
// that cannot be: the disk has damaged it, or it never got there because the machine died.
func readSlot(slot []byte, n int64) (click clickSum, host []byte, ok bool) {
	word := binary.LittleEndian.Uint64(slot[slotWord:])
	length := word >> wordHost & 0xff
	click.linkID = int64(binary.LittleEndian.Uint64(slot[slotLink:]))
	click.second = int64(word & 0xffffffff)
	click.bot = word&wordBot != 0
	click.count = 1
	if binary.LittleEndian.Uint64(slot[slotNumber:]) != uint64(n) || length > maxHost ||
		click.linkID <= 0 || click.second < firstSecond || click.second > lastSecond {
		return clickSum{}, nil, false
	}
	host = slot[slotHost:][:length]
	for _, c := range host {
		if !isHostByte(c) {
			return clickSum{}, nil, false
		}
	}
	return click, host, true
}

// isHostByte says whether c can stand in a host that refererHost returns.
func isHostByte(c byte) bool {
	return isLetterOrDigit(c) || strings.IndexByte("-.:[]_", c) >= 0
}

// next looks through a journal that a process left, and returns the number after its last click.
// That is counted if all of its clicks are counted.
//
// Below it slots may be missing, but only if the machine died and the kernel had not written all
// pages, or if the disk has damaged some.
func (j *journal) next() (int64, error) {
	next := j.counted
	chunk := make([]byte, 1<<20)
	for at := int64(0); at < journalSlots; at += int64(len(chunk)) / slotSize {
		read, err := j.file.ReadAt(chunk, headerSize+at*slotSize)
		if err != nil && err != io.EOF {
			return 0, err
		}
		for i := int64(0); (i+1)*slotSize <= int64(read); i++ {
			n := int64(binary.LittleEndian.Uint64(chunk[i*slotSize+slotNumber:]))
			isThere := slotOffset(n) == headerSize+(at+i)*slotSize
			if isThere && n >= next && n < j.counted+journalSlots {
				next = n + 1
			}
		}
		if err == io.EOF {
			break
		}
	}
	return next, nil
}

// short says whether the file has lost its end, and clicks with it.
func (j *journal) short() bool {
	info, err := j.file.Stat()
	return err == nil && info.Size() < journalSize
}

// trim gives back the disk space that a left journal does not use; next is the number after its
// last click. A process that dies again and again while PostgreSQL is away leaves many journals.
func (j *journal) trim(next int64) error {
	if next > journalSlots || j.short() {
		return nil // it went round: clicks are anywhere
	}
	return freeSpace(j.file, slotOffset(next-1)+slotSize, journalSize)
}

// The journals of the first release were two halves of blank or written slots.
const (
	oldHalfSlots = 1 << 18
	oldGap       = 1 << 14 // no written slot comes after so many blank ones
)

// holdsOldClicks says whether path is a journal of the first release, left by a dead process, that
// holds clicks which nobody will count.
func holdsOldClicks(path string) bool {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	if held, err := lockFile(f); err != nil || !held {
		return false // its process lives
	}
	slots := make([]byte, oldGap*slotSize)
	for half := range int64(2) {
		read, err := f.ReadAt(slots, headerSize+half*oldHalfSlots*slotSize)
		if err != nil && err != io.EOF {
			return false
		}
		for at := 0; at+slotSize <= read; at += slotSize {
			if binary.LittleEndian.Uint64(slots[at:]) != 0 {
				return true
			}
		}
	}
	return false
}
