package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestJournalLayout holds the file format: releases read each other's journals.
func TestJournalLayout(t *testing.T) {
	if slotHost+maxHost != slotSize {
		t.Fatalf("a slot has %d bytes, and its parts %d", slotSize, slotHost+maxHost)
	}
	c := testClickLog(t, t.TempDir(), newLedger())
	c.record(0x0102030405060708, noon, true, "a.example")
	flushOK(t, c)
	c.record(7, noon, false, "")
	content, err := os.ReadFile(c.own.name())
	if err != nil {
		t.Fatal(err)
	}
	header := "hop clicks 2 64\n" + "\x02\x00\x00\x00\x00\x00\x00\x00" +
		c.own.id + "\x00\x00\x00\x00\x00\x00" + "ours\x00"
	if got := string(content[:len(header)]); got != header {
		t.Errorf("header %q\nwant   %q", got, header)
	}
	second := binary.LittleEndian.AppendUint32(nil, noon)
	slot := "\x01\x00\x00\x00\x00\x00\x00\x00" + string(second) + "\x09\x01\x00\x00" +
		"\x08\x07\x06\x05\x04\x03\x02\x01" + "a.example\x00"
	if got := string(content[4096+64:][:len(slot)]); got != slot {
		t.Errorf("slot %q\nwant %q", got, slot)
	}
	if len(content) != 4096+64<<19 {
		t.Errorf("%d bytes", len(content))
	}
}

// TestJournalDamaged drops and counts exactly the clicks whose slots are damaged, in the journal of
// a living process and in one that was left.
func TestJournalDamaged(t *testing.T) {
	tests := []struct {
		name    string
		damage  func(slot []byte)
		harmful bool
	}{
		{"none", func([]byte) {}, false},
		{"blank", func(slot []byte) { clear(slot) }, true},
		{"ones", func(slot []byte) { copy(slot, strings.Repeat("\xff", slotSize)) }, true},
		{"number", func(slot []byte) { slot[slotNumber] ^= 8 }, true},
		{"number of another lap", func(slot []byte) { slot[slotNumber+2] ^= 8 }, true},
		{"second too early", func(slot []byte) { slot[slotWord+3] = 0 }, true},
		{"second too late", func(slot []byte) { slot[slotWord+3] = 0xff }, true},
		{"length of the host", func(slot []byte) { slot[slotWord+4] = maxHost + 1 }, true},
		{"link 0", func(slot []byte) { clear(slot[slotLink:][:8]) }, true},
		{"negative link", func(slot []byte) { slot[slotLink+7] |= 0x80 }, true},
		{"zero in the host", func(slot []byte) { slot[slotHost+2] = 0 }, true},
		{"quote in the host", func(slot []byte) { slot[slotHost] = '"' }, true},
		{"no UTF-8 in the host", func(slot []byte) { slot[slotHost+1] = 0xff }, true},
		{"after the host", func(slot []byte) { slot[slotHost+20] = 0xff }, false},
	}
	for _, tt := range tests {
		for _, left := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, left %v", tt.name, left), func(t *testing.T) {
				books := newLedger()
				c := testClickLog(t, t.TempDir(), books)
				for range 9 {
					c.record(7, noon, false, "a.example")
				}
				tt.damage(c.own.mem[slotOffset(5):][:slotSize])
				if left {
					c = testClickLog(t, crash(t, c), books)
				}
				flushOK(t, c)
				dropped := int64(0)
				if tt.harmful {
					dropped = 1
				}
				checkCounts(t, c, 9, 9-dropped, dropped)
				books.check(t, true, []clickSum{
					{linkID: 7, second: noon, count: 9 - dropped, referrer: "a.example"},
				})
			})
		}
	}
}

// TestJournalTruncated counts what is left of a file that lost its end.
func TestJournalTruncated(t *testing.T) {
	tests := []struct {
		size    int64
		clicks  int64 // of 10
		warning string
	}{
		{0, 0, ""}, // as if its process had died while making it
		{10, 0, "cannot be read"},
		{headerMagic + headerEnd, 0, "lost its end"},
		{headerSize, 0, "lost its end"},
		{headerSize + 4*slotSize, 3, "lost its end"},
		{headerSize + 4*slotSize + 20, 3, "lost its end"},
		{headerSize + 500*slotSize, 10, "lost its end"},
		{journalSize, 10, ""},
		{journalSize + 5, 10, ""},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.size, " bytes"), func(t *testing.T) {
			books := newLedger()
			c := testClickLog(t, t.TempDir(), books)
			recordN(c, 7, 10)
			dir := crash(t, c)
			if err := os.Truncate(journalPath(dir, 0), tt.size); err != nil {
				t.Fatal(err)
			}
			logs := &syncBuffer{}
			c = newClickLog(dir, true, books.save, slog.New(slog.NewTextHandler(logs, nil)))
			t.Cleanup(c.close)
			c.belongsTo("ours")
			flushOK(t, c)
			books.check(t, true, []clickSum{{linkID: 7, second: noon, count: tt.clicks}})
			warned := strings.Contains(logs.String(), "level=WARN")
			if warned != (tt.warning != "") || !strings.Contains(logs.String(), tt.warning) {
				t.Errorf("logged: %s", logs)
			}
		})
	}
}

// TestJournalHeaderDamaged leaves a file alone that cannot be read, says so once, and uses another.
func TestJournalHeaderDamaged(t *testing.T) {
	tests := map[string]func(header []byte){
		"another format": func(header []byte) { header[11] = '3' },
		"no id":          func(header []byte) { clear(header[headerID:headerDatabase]) },
		"wild id":        func(header []byte) { header[headerID+3] = '\n' },
		"wild database":  func(header []byte) { header[headerDatabase] = 0xff },
		"counted 0":      func(header []byte) { clear(header[headerCounted:headerID]) },
		"counted < 0":    func(header []byte) { header[headerCounted+7] = 0xff },
		"counted > all":  func(header []byte) { header[headerCounted+7] = 0x7f },
	}
	for name, damage := range tests {
		t.Run(name, func(t *testing.T) {
			books := newLedger()
			c := testClickLog(t, t.TempDir(), books)
			recordN(c, 7, 10)
			damage(c.own.mem)
			dir := crash(t, c)
			logs := &syncBuffer{}
			c = newClickLog(dir, true, books.save, slog.New(slog.NewTextHandler(logs, nil)))
			t.Cleanup(c.close)
			c.belongsTo("ours")
			for range 3 {
				c.adopted = time.Time{}
				recordN(c, 8, 1)
				flushOK(t, c)
			}
			books.check(t, true, []clickSum{{linkID: 8, second: noon, count: 3}})
			if n := strings.Count(logs.String(), "cannot be read"); n != 1 {
				t.Errorf("warned %d times: %s", n, logs)
			}
			if c.own.name() != journalPath(dir, 1) || len(journals(t, dir)) != 2 {
				t.Errorf("it uses %s beside %v", c.own.name(), journals(t, dir))
			}
		})
	}
}

// TestJournalLaps goes round the ring, and counts what a killed process left across its seam.
func TestJournalLaps(t *testing.T) {
	books := newLedger()
	c := testClickLog(t, t.TempDir(), books)
	const counted = 2*journalSlots - 100
	recordN(c, 7, journalSlots)
	flushOK(t, c)
	recordN(c, 7, counted-journalSlots)
	flushOK(t, c)
	c.prepare() // across the seam
	recordN(c, 7, 200)
	next := testClickLog(t, crash(t, c), books)
	flushOK(t, next)
	books.check(t, true, []clickSum{{linkID: 7, second: noon, count: counted + 200}})
	checkCounts(t, next, 200, 200, 0)
}

// TestJournalSpace gives back what left journals do not use, and stops at the largest number of
// files.
func TestJournalSpace(t *testing.T) {
	books, dir := newLedger(), t.TempDir()
	space := func() int64 {
		var bytes int64
		for _, name := range journals(t, dir) {
			info, err := os.Stat(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			bytes += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return bytes
	}
	for range 10 { // PostgreSQL is away, and each process is killed
		c := testClickLog(t, dir, books)
		if len(journals(t, dir)) == 1 && space() < journalSize {
			t.Errorf("a journal reserves %d bytes of %d", space(), journalSize)
		}
		recordN(c, 7, 100)
		c.own.close()
	}
	c := testClickLog(t, dir, books)
	if n := space(); n > journalSize+1<<20 {
		t.Errorf("ten dead journals and a living one take %d bytes", n)
	}
	flushOK(t, c)
	books.check(t, true, []clickSum{{linkID: 7, second: noon, count: 1000}})
	c.close()

	for n := range maxJournals {
		if err := os.WriteFile(journalPath(dir, n), []byte("not ours"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := createJournal(dir); err == nil || !strings.Contains(err.Error(), "256") {
		t.Errorf("with %d files there already: %v", maxJournals, err)
	}
	if n := len(journals(t, dir)); n != maxJournals {
		t.Errorf("%d files", n)
	}
}

// TestJournalNames never takes a file for its own that another process removed or replaced between
// opening and locking it.
func TestJournalNames(t *testing.T) {
	dir := t.TempDir()
	j, err := createJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openLeftJournal(j.name()); !errors.Is(err, errJournalHeld) {
		t.Errorf("opening a journal in use: %v", err)
	}
	f, err := os.OpenFile(j.name(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	j.remove()
	late := &journal{file: f}
	if err := late.lock(); !errors.Is(err, errJournalHeld) {
		t.Errorf("locking a removed journal: %v", err)
	}
	other, err := createJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer other.remove()
	late.remove() // must not take the other's file, which has the same name
	if !other.named() {
		t.Error("another process's journal was removed")
	}
	if _, err := openLeftJournal(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening none: %v", err)
	}
}

// TestJournalOfOldRelease leaves journals of the first release alone, and says if clicks are in
// them.
func TestJournalOfOldRelease(t *testing.T) {
	tests := []struct {
		name string
		at   int64 // of a written slot
		want bool
	}{
		{"all counted", -1, false},
		{"in the first half", headerSize, true},
		{"after blank slots", headerSize + 9000*slotSize, true},
		{"in the second half", headerSize + oldHalfSlots*slotSize, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			content := make([]byte, headerSize+2*oldHalfSlots*slotSize)
			copy(content[8:], "an id and a boot id")
			if tt.at >= 0 {
				content[tt.at+7] = 0x80
			}
			path := oldJournalPath(dir, 0)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			logs := &syncBuffer{}
			c := newClickLog(dir, true, newLedger().save, slog.New(slog.NewTextHandler(logs, nil)))
			defer c.close()
			warned := strings.Contains(logs.String(), path)
			if warned != tt.want || strings.Count(logs.String(), "level=") > 1 {
				t.Errorf("logged: %s", logs)
			}
			if _, err := os.Stat(path); err != nil {
				t.Error(err)
			}
		})
	}
}

// FuzzJournal puts any bytes into a left journal. Whatever they are, its clicks are counted or
// dropped, and a flush succeeds.
func FuzzJournal(f *testing.F) {
	f.Add(0, []byte("hop"))
	f.Add(headerCounted, []byte{9})
	f.Add(headerID, []byte("ANOTHER"))
	f.Add(headerSize+5*slotSize, []byte{4, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, at int, content []byte) {
		books := newLedger()
		c := testClickLog(t, t.TempDir(), books)
		recordN(c, 7, 20)
		dir := crash(t, c)
		file, err := os.OpenFile(journalPath(dir, 0), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		at = max(at, 0) % (headerSize + 30*slotSize)
		_, err = file.WriteAt(content[:min(len(content), 1000)], int64(at))
		if err != nil {
			t.Fatal(err)
		}
		file.Close()
		next := testClickLog(t, dir, books)
		recordN(next, 8, 1)
		flushOK(t, next)
		if n := books.link(8); n != 1 {
			t.Errorf("%d clicks counted of the living process", n)
		}
	})
}
