package main

import (
	"context"
	"sync/atomic"
	"time"
)

// How many at once: a limit on what may be under way, and the batching of what waits.

// limiter caps how many do one thing at the same time.
type limiter struct {
	max int64
	n   atomic.Int64
}

// enter says whether there is room. If there is, leave must follow.
func (l *limiter) enter() bool { return l.enterAll(1) }

// leave makes room for the next.
func (l *limiter) leave() { l.leaveAll(1) }

// enterAll is enter for n at once, of which either all or none find room.
func (l *limiter) enterAll(n int64) bool {
	if l.n.Add(n) > l.max {
		l.n.Add(-n)
		return false
	}
	return true
}

// leaveAll is leave for n at once.
func (l *limiter) leaveAll(n int64) { l.n.Add(-n) }

// takeQueued returns first and what else waits in queue, at most n in all. It never waits: under
// load batches grow by themselves, and without load nobody waits for company.
func takeQueued[T any](queue <-chan T, first T, n int) []T {
	batch := []T{first}
	for len(batch) < n {
		select {
		case next := <-queue:
			batch = append(batch, next)
		default:
			return batch
		}
	}
	return batch
}

// maxWaiting is how many requests may wait for misses. Each holds a connection and a goroutine
// (connBytes).
const maxWaiting = 2048

// batchSize is how many questions share one round trip. Beyond that, batches cost latency and win
// nothing.
const batchSize = 64

// batcher answers many questions of one moment with one call. Workers take what is queued.
type batcher[Q, A any] struct {
	queue chan *pending[Q, A]
	call  func(ctx context.Context, questions []Q) ([]A, error)
}

// pending is a question that waits for its answer.
type pending[Q, A any] struct {
	question Q
	answer   A
	err      error
	done     chan struct{} // closed when answer or err is set
}

// newBatcher starts workers that answer with call, which returns an answer for each question, in
// their order. They live as long as the process.
func newBatcher[Q, A any](workers int,
	call func(ctx context.Context, questions []Q) ([]A, error)) *batcher[Q, A] {

	b := &batcher[Q, A]{queue: make(chan *pending[Q, A], maxWaiting), call: call}
	for range workers {
		go b.work()
	}
	return b
}

// ask returns the answer to question, or fails when ctx ends or too many wait.
func (b *batcher[Q, A]) ask(ctx context.Context, question Q) (A, error) {
	p := &pending[Q, A]{question: question, done: make(chan struct{})}
	select {
	case b.queue <- p:
	default:
		return p.answer, errOverloaded
	}
	select {
	case <-p.done:
		return p.answer, p.err
	case <-ctx.Done():
		var none A
		return none, errUnavailable
	}
}

// work answers batch after batch. A call must end by itself: those who wait for it come and go, so
// that it gets none of their contexts.
func (b *batcher[Q, A]) work() {
	for first := range b.queue {
		batch := takeQueued(b.queue, first, batchSize)
		questions := make([]Q, len(batch))
		for i, p := range batch {
			questions[i] = p.question
		}
		answers, err := b.call(context.Background(), questions)
		for i, p := range batch {
			p.err = err
			if err == nil {
				p.answer = answers[i]
			}
			close(p.done)
		}
	}
}

// budget allows rate events per second.
type budget struct {
	rate   int64
	second atomic.Int64 // the unix second that spent counts
	spent  atomic.Int64
}

// spend says whether one more event is allowed at now. Calls that meet at the turn of a second may
// be forgotten: a few too many pass then.
func (b *budget) spend(now time.Time) bool {
	second := now.Unix()
	if b.second.Swap(second) != second {
		b.spent.Store(0)
	}
	return b.spent.Add(1) <= b.rate
}
