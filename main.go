// Hop is a URL shortener that stays fast and truthful when hundreds of people hit it at once and when its database or cache dies.
//
//	hop [serve]      serve HTTP on PORT until SIGTERM
//	hop seed [DIR]   load users.csv, urls.csv and events.csv, by default the built-in 400/2,000/3,422; safe to run twice
//	hop export DIR   write the three files
//	hop health       exit 0 if the server on PORT is healthy, for containers
//
// Settings, from the environment:
//
//	PORT                 8080; 0 picks a free one
//	DATABASE_URL         postgres://user:password@host:port/name, or key=value; else PGHOST, PGPORT, PGUSER, …
//	DATABASE_PUBLIC_URL  used when DATABASE_URL is not set or its host does not resolve
//	DB_CONNS             connections for requests: 4 per core; 4 more are for background work
//	REDIS_URL            redis://host:port; without it hop runs with its local cache alone
//	BASE_URL             what short links begin with: http://localhost:PORT
//	API_TOKEN            one or more tokens of 32 bytes or more, comma-separated: everything but redirects and health needs one
//	DATA_DIR             data: where clicks wait for PostgreSQL and survive kill -9; 32 MiB per process
//	LOCAL_CACHE          100000: links kept in this process, about 400 bytes each
//	CLICK_EVENTS         on: each click is a row in events, not only counted
//	ALLOW_PRIVATE        off: links may not lead into private networks
//	MAX_INFLIGHT         4096: requests answered at once; more get 503
//	LOG_LEVEL            info; debug also logs every redirect
//
// Signals: SIGTERM and SIGINT drain for 2 s, let requests finish for 10 s, count the last clicks and leave; a second one leaves at
// once. Killed with -9, hop loses no click it answered: see clicks.go for the cases in which some are lost.
package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

//go:embed main.go
var manual string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	go func() { <-ctx.Done(); stop() }() // the second signal kills
	if err := run(ctx, os.Args[1:], os.Getenv); err != nil {
		fmt.Fprintln(os.Stderr, "hop:", strings.ReplaceAll(err.Error(), "\n", "\nhop: "))
		os.Exit(1)
	}
}

// run is the program, until ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string) error {
	command := "serve"
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	if strings.HasPrefix(command, "-") || command == "help" {
		text, _, _ := strings.Cut(manual, "package main")
		for line := range strings.Lines(text) {
			fmt.Print(strings.TrimPrefix(strings.TrimPrefix(line, "//"), " "))
		}
		return nil
	}
	cfg, err := loadConfig(getenv)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	switch {
	case command == "serve" && len(args) == 0:
		return serve(ctx, cfg, log)
	case command == "health" && len(args) == 0:
		return askHealth(cfg.Port)
	case command == "seed" && len(args) < 2, command == "export" && len(args) == 1:
		return files(ctx, cfg, command, args, log)
	}
	return fmt.Errorf("%s %s: no such command, see hop -h", command, strings.Join(args, " "))
}

// files runs seed and export.
func files(ctx context.Context, cfg Config, command string, args []string, log *slog.Logger) error {
	store, err := openStore(cfg, log)
	if err != nil {
		return err
	}
	defer store.close()
	if err = store.probe(2 * time.Second); err == nil {
		err = store.migrate(ctx)
	}
	if err != nil {
		return err
	}
	if command == "export" {
		return store.export(args[0])
	}
	var dir fs.FS
	if dir, err = fs.Sub(seeds, "seeds"); len(args) > 0 {
		dir = os.DirFS(args[0])
	}
	return errors.Join(err, store.seed(dir, cfg.rules(), os.Stdout))
}

// askHealth is the container's HEALTHCHECK.
func askHealth(port int) error {
	client := http.Client{Timeout: 2 * time.Second}
	resp, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/health", port))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return err
}

const (
	drainFor   = 2 * time.Second  // balancers see the 503 of /health, clients the Connection: close; a bare Shutdown broke 500 of 33,000
	finishFor  = 10 * time.Second // longest a request under way may still take
	flushFor   = 5 * time.Second  // for the last clicks; what is left survives in the journal
	readWithin = 5 * time.Second  // for a whole request of at most 16 KiB: a slowloris keeps a connection no longer
	maxConns   = 20_000           // open connections; each costs about 10 KB
	memoryBase = 24 << 20         // of the soft memory limit, to which LOCAL_CACHE and connections add
)

// serve opens everything, serves, and closes in the reverse order. It listens at once, before its dependencies answer.
func serve(ctx context.Context, cfg Config, log *slog.Logger) error {
	tuneGC(cfg, 0)
	store, err := openStore(cfg, log)
	if err != nil {
		return err
	}
	defer store.close()
	local := newLocalTier(cfg.LocalCache)
	var tier *redisTier
	if cfg.RedisURL != "" {
		tier = openRedis(cfg.RedisURL, local, store.targets, log)
		defer tier.pool.Close()
	}
	listen := net.ListenConfig{Control: sharePort}
	listener, err := listen.Listen(ctx, "tcp", fmt.Sprintf(":%d", cfg.Port))
	if err != nil {
		return fmt.Errorf("%w (set PORT to another port)", err)
	}
	if cfg.Port == 0 {
		cfg.BaseURL = "http://" + listener.Addr().String()
	}
	clicks := newClickLog(cfg.DataDir, cfg.ClickEvents, store.saveClicks, log)
	s := newServer(cfg, store, newCache(tier, local, store.target), clicks, log)
	server := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: readWithin,
		ReadTimeout:       readWithin,
		WriteTimeout:      15 * time.Second,
		IdleTimeout:       60 * time.Second, // longer than balancers keep theirs would cost them resets; shorter costs us handshakes
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnState:         capConns(maxConns, func(conns int64) { tuneGC(cfg, conns) }),
	}
	log.Info("listening", "addr", listener.Addr().String(), "config", cfg)

	background, stopBackground := context.WithCancel(context.Background())
	defer stopBackground()
	stopClicks, clicksDone := make(chan struct{}), make(chan struct{})
	go func() { clicks.run(stopClicks); close(clicksDone) }()
	go s.start(background)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}

	log.Info("draining")
	s.draining.Store(true)
	time.Sleep(drainFor)
	finish, cancel := context.WithTimeout(context.Background(), finishFor)
	defer cancel()
	err = server.Shutdown(finish)
	close(stopClicks)
	select {
	case <-clicksDone:
	case <-time.After(flushFor):
		log.Error("clicks left in the journal", "clicks", clicks.pendingClicks())
	}
	log.Info("stopped")
	return err
}

// start waits for PostgreSQL, applies the schema, warms Redis and the local tier, and then calls the server ready. What fails is
// tried again for ever.
func (s *Server) start(ctx context.Context) {
	tier := s.cache.redis
	track := sync.OnceFunc(func() {
		if tier != nil {
			go tier.track(ctx)
		}
	})
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := s.store.probe(probeEvery)
		if err == nil {
			err = s.store.migrate(ctx)
		}
		if err == nil {
			break
		}
		s.log.Warn("not ready", "err", err)
		track() // without PostgreSQL too: after a kill, a warm Redis serves the known links
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
	go s.store.monitor(ctx)
	if tier != nil {
		codes, warm := tier.warm(s.cfg.LocalCache), make(chan struct{})
		go tier.keepWarm(ctx, codes, warm)
		track()  // only now, or Redis would tell of every key just warmed
		select { // ready with a warm local tier if Redis is there, without if it is not
		case <-warm:
		case <-time.After(time.Second):
		}
	}
	s.ready.Store(true)
	s.log.Info("ready")
}

// tuneGC lets the heap grow to five times what lives, up to a limit that LOCAL_CACHE and open connections set, unless GOGC or
// GOMEMLIMIT say else: a redirect's garbage is small, and collecting it four times less often is 15 % of throughput.
func tuneGC(cfg Config, conns int64) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryBase + int64(cfg.LocalCache)*400 + conns*24<<10)
	}
}

// capConns closes new connections while limit are open: idle ones must not cost unbounded memory. grown is called at every
// thousandth.
func capConns(limit int64, grown func(conns int64)) func(net.Conn, http.ConnState) {
	var open atomic.Int64
	return func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			if n := open.Add(1); n > limit {
				c.Close()
			} else if n%1000 == 0 {
				grown(n)
			}
		case http.StateClosed, http.StateHijacked:
			open.Add(-1)
		}
	}
}
