package main

import (
	"os"
	"strings"
	"testing"
	"time"
)

// TestLogNeverBlocks logs to somebody who does not read: no line waits, those that do not fit are
// counted, and the end is not held up for long.
func TestLogNeverBlocks(t *testing.T) {
	reader, stuck, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	defer stuck.Close()
	w := newQueuedWriter(stuck)
	line := []byte(strings.Repeat("x", 255) + "\n")
	start := time.Now()
	for range 4 * logQueue {
		w.Write(line)
	}
	took := time.Since(start)
	if took > 5*time.Second || w.dropped.Load() < 2*logQueue {
		t.Errorf("%d lines took %v, %d were dropped", 4*logQueue, took, w.dropped.Load())
	}
	start = time.Now()
	w.close()
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("the end took %v", took)
	}
}

// TestLogIsWhole reads what was logged until the end.
func TestLogIsWhole(t *testing.T) {
	var read syncBuffer
	w := newQueuedWriter(&read)
	for range 1000 {
		w.Write([]byte("line\n"))
	}
	w.close()
	if n := strings.Count(read.String(), "line\n"); n != 1000 {
		t.Errorf("%d lines of 1000", n)
	}
}
