package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestLimiter(t *testing.T) {
	l := limiter{max: 2}
	first := l.enter()
	second := l.enter()
	third := l.enter()
	if !first || !second || third {
		t.Errorf("entered: %v, %v, %v; want the first two of three", first, second, third)
	}
	l.leave()
	if !l.enter() {
		t.Error("no room although one has left")
	}
}

func TestTakeQueued(t *testing.T) {
	queue := make(chan int, 10)
	for i := range 5 {
		queue <- i + 1
	}
	if got := takeQueued(queue, 0, 4); !slices.Equal(got, []int{0, 1, 2, 3}) {
		t.Errorf("the first batch is %v, want 4 in their order", got)
	}
	if got := takeQueued(queue, 9, 4); !slices.Equal(got, []int{9, 4, 5}) {
		t.Errorf("the second batch is %v, want all that is left", got)
	}
}

func TestBudget(t *testing.T) {
	b := budget{rate: 3}
	second := time.Unix(1_800_000_000, 0)
	allowed := 0
	for range 10 {
		if b.spend(second) {
			allowed++
		}
	}
	if allowed != 3 {
		t.Errorf("%d of 10 are allowed in one second, want 3", allowed)
	}
	if !b.spend(second.Add(time.Second)) {
		t.Error("nothing is allowed in the next second")
	}
}

// TestBatcher asks 1,000 questions while a call is under way: each gets its own answer, and they
// share calls.
func TestBatcher(t *testing.T) {
	const questions = 1000
	begin := make(chan struct{})
	var calls, largest atomic.Int64
	b := newBatcher(1, func(_ context.Context, batch []int) ([]int, error) {
		<-begin
		calls.Add(1)
		largest.Store(max(largest.Load(), int64(len(batch))))
		var answers []int
		for _, q := range batch {
			answers = append(answers, 2*q)
		}
		return answers, nil
	})
	var all sync.WaitGroup
	for q := range questions {
		all.Go(func() {
			answer, err := b.ask(t.Context(), q)
			if err != nil || answer != 2*q {
				t.Errorf("%d is answered by %d, %v", q, answer, err)
			}
		})
	}
	eventually(t, patience, "all wait but those of the first call", func() bool {
		return len(b.queue) >= questions-batchSize
	})
	close(begin)
	all.Wait()
	if calls.Load() > questions/batchSize+2 || largest.Load() != batchSize {
		t.Errorf("%d calls, the largest with %d questions", calls.Load(), largest.Load())
	}
}

// TestBatcherFailures has calls that fail or hang, and more questions than may wait.
func TestBatcherFailures(t *testing.T) {
	sick := errors.New("sick")
	called := make(chan int, maxWaiting)
	hung := make(chan struct{})
	b := newBatcher(1, func(_ context.Context, batch []int) ([]int, error) {
		called <- len(batch)
		<-hung
		return nil, sick
	})
	ctx, cancel := context.WithCancel(t.Context())
	results := make(chan error, maxWaiting+2)
	question := func() {
		_, err := b.ask(ctx, 0)
		results <- err
	}
	go question()
	<-called // the worker has it, so that the queue is empty
	for range maxWaiting {
		go question()
	}
	eventually(t, patience, "the queue is full", func() bool {
		return len(b.queue) == maxWaiting
	})
	if _, err := b.ask(ctx, 0); err != errOverloaded {
		t.Errorf("one more than may wait is told %v, want %v", err, errOverloaded)
	}
	cancel()
	for range maxWaiting + 1 {
		if err := <-results; err != errUnavailable {
			t.Fatalf("who waited when its time was over is told %v, want %v", err, errUnavailable)
		}
	}
	close(hung)
	eventually(t, patience, "the worker is free", func() bool { return len(b.queue) == 0 })
	if _, err := b.ask(t.Context(), 0); err != sick {
		t.Errorf("a failed call's error is %v, want %v", err, sick)
	}
}
