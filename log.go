package main

import (
	"io"
	"log/slog"
	"sync/atomic"
	"time"
)

// Logging never blocks an answer: lines go through a queue, and when whoever reads them has
// stopped, further ones are dropped and counted.

// logQueue is how many lines wait for their reader: about 2 MB.
const logQueue = 8192

// queuedWriter writes in the background what it is given.
type queuedWriter struct {
	lines   chan []byte
	stop    chan struct{} // closed by close
	done    chan struct{} // closed when everything is written
	dropped atomic.Int64
}

// newQueuedWriter returns a writer in front of out.
func newQueuedWriter(out io.Writer) *queuedWriter {
	w := &queuedWriter{
		lines: make(chan []byte, logQueue),
		stop:  make(chan struct{}),
		done:  make(chan struct{}),
	}
	go w.writeTo(out)
	return w
}

// writeTo writes lines as they come, until close; then what is left. Nowhere is left to say that a
// write failed.
func (w *queuedWriter) writeTo(out io.Writer) {
	defer close(w.done)
	for {
		select {
		case line := <-w.lines:
			out.Write(line)
			continue
		case <-w.stop:
		}
		for {
			select {
			case line := <-w.lines:
				out.Write(line)
			default:
				return
			}
		}
	}
}

// Write queues a copy of line.
func (w *queuedWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- append([]byte(nil), line...):
	default:
		w.dropped.Add(1)
	}
	return len(line), nil
}

// close writes what is queued and ends the writer; later lines are lost. It waits for a reader that
// has stopped for a second at most.
func (w *queuedWriter) close() {
	close(w.stop)
	select {
	case <-w.done:
	case <-time.After(time.Second):
	}
}

// newLogger returns a logger that writes lines of text or JSON.
func newLogger(out io.Writer, format string, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(out, options))
	}
	return slog.New(slog.NewTextHandler(out, options))
}
