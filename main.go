// Hop is a URL shortener that stays fast and truthful when hundreds of people hit it at once and
// when its database or cache dies under it.
//
//	hop [serve]         serve HTTP on PORT until SIGTERM
//	hop seed [DIR]      load users.csv, urls.csv and events.csv, by default the built-in ones with
//	                    400, 2,000 and 3,422 rows; safe to run twice
//	hop export DIR      write these files, and what they cannot hold into links.csv and clicks.csv
//	hop export --map    print "code target" lines that nginx's map reads
//	hop import FILE     say what bringing links along from another service would do: Bitly's,
//	                    YOURLS's, Kutt's and Shlink's CSVs and plain sheets; --apply does it
//	hop verify          compare counts, figures per day and rows of clicks; 1 if they differ
//	hop migrate         bring the tables up to date, which serve and seed also do
//	hop health          exit 0 if the server on PORT is healthy, for containers
//	hop version         print the release, its commit and what built it
//
// Settings, from the environment. Those marked * may be given as NAME_FILE, the path of a file that
// holds the value:
//
//	PORT                   8080; 0 picks a free one. Hops of one database may share a port
//	BASE_URL               what short links begin with: http://localhost:PORT
//	DATABASE_URL *         postgres://user:password@host:port/name, or key=value; else PGHOST, …
//	DATABASE_PUBLIC_URL *  used when DATABASE_URL is not set or its host does not resolve
//	DB_CONNS               connections for requests: 4 per core, at least 8; half as many more are
//	                       for lists and figures, 2 for bulk creates, and 6 for background work
//	REDIS_URL *            redis://host:port, or redis+sentinel://host1,host2/mymaster; without it
//	                       hop runs with its local cache alone
//	API_TOKEN *            one or more tokens of 32 bytes or more, separated by commas: creates,
//	                       changes, lists and figures then need one
//	READ_TOKEN *           likewise, for reading only
//	DATA_DIR               data: where clicks wait for PostgreSQL and survive kill -9
//	LOCAL_CACHE            100000: links kept in this process, 400 bytes each
//	WARM_LINKS             1000000: links brought into Redis at the start, newest first
//	MAX_INFLIGHT           4096: requests answered at once; more get 503
//	CLICK_EVENTS           on: each click is a row in events, not only counted
//	KEEP_CLICKS            how long these rows are kept, as in 90d; for ever if not set
//	ALLOW_PRIVATE          off: links may not lead into private networks
//	HOME_URL               where / leads instead of hop's own page
//	LOG_LEVEL              info; debug also logs redirects, 404s and probes
//	LOG_FORMAT             text, or json
//
// Signals: SIGTERM and SIGINT drain for 2 s, let requests finish for 10 s, count the last clicks
// and leave; a second one leaves at once. Killed with -9, hop loses no click it answered: see
// clicks.go for the cases in which some are lost.
package main

import (
	"cmp"
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
	"runtime"
	"runtime/debug"
	"slices"
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
	context.AfterFunc(ctx, stop) // so that the second signal kills
	if err := run(ctx, os.Args[1:], os.Getenv); err != nil {
		fmt.Fprintln(os.Stderr, "hop:", strings.ReplaceAll(err.Error(), "\n", "\nhop: "))
		os.Exit(1)
	}
}

// run is the program, until ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string) error {
	command := "serve"
	if len(args) > 0 {
		command = args[0]
		args = args[1:]
	}
	switch {
	case strings.HasPrefix(command, "-") || command == "help":
		printManual()
		return nil
	case command == "version":
		fmt.Printf("hop %s, commit %s, %s %s/%s\n", version(), cmp.Or(commit(), "unknown"),
			runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return nil
	}
	cfg, err := loadConfig(getenv)
	if err != nil {
		return err
	}
	logs := newQueuedWriter(os.Stderr)
	defer logs.close()
	log := newLogger(logs, cfg.LogFormat, cfg.LogLevel)
	switch {
	case command == "serve" && len(args) == 0:
		return serve(ctx, cfg, log)
	case command == "health" && len(args) == 0:
		return askHealth(ctx, cfg.Port)
	case command == "migrate" && len(args) == 0:
		return withStore(ctx, cfg, log, func(*Store) error { return nil })
	case command == "verify" && len(args) == 0:
		return withStore(ctx, cfg, log, func(store *Store) error {
			return store.verify(ctx, os.Stdout)
		})
	case command == "seed" && len(args) < 2:
		return withStore(ctx, cfg, log, func(store *Store) error {
			return seedFrom(ctx, store, args)
		})
	case command == "export" && len(args) == 1 && args[0] == "--map":
		return withStore(ctx, cfg, log, func(store *Store) error {
			return store.exportMap(ctx, os.Stdout)
		})
	case command == "import" && len(args) > 0 && len(args) < 3:
		return withStore(ctx, cfg, log, func(store *Store) error {
			return importFrom(ctx, store, cfg, args)
		})
	case command == "export" && len(args) == 1:
		return withStore(ctx, cfg, log, func(store *Store) error {
			return store.export(ctx, args[0])
		})
	}
	return fmt.Errorf("%s %s: no such command, see hop -h", command, strings.Join(args, " "))
}

// printManual prints this file's comment, which is the operator's manual.
func printManual() {
	text, _, _ := strings.Cut(manual, "package main")
	for line := range strings.Lines(text) {
		fmt.Print(strings.TrimPrefix(strings.TrimPrefix(line, "//"), " "))
	}
}

// openDatabase prepares the connections that the settings name.
func openDatabase(ctx context.Context, cfg Config, log *slog.Logger) (*Store, error) {
	lookup := net.DefaultResolver.LookupHost
	config, notes, err := chooseDatabase(ctx, cfg.DatabaseURL, cfg.DatabasePublicURL, lookup)
	for _, note := range notes {
		log.Info(note)
	}
	if err != nil {
		return nil, err
	}
	return newStore(openPostgres(config, cfg.DBConns, log)), nil
}

// withStore does something with the database and its newest schema.
func withStore(ctx context.Context, cfg Config, log *slog.Logger, do func(*Store) error) error {
	store, err := openDatabase(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer store.pg.close()
	if err := store.pg.probe(ctx); err != nil {
		return err
	}
	if _, err := store.migrate(ctx); err != nil {
		return err
	}
	return do(store)
}

// seedFrom loads the files of a directory, or the built-in ones.
func seedFrom(ctx context.Context, store *Store, args []string) error {
	dir, err := fs.Sub(seeds, "seeds")
	if err != nil {
		return err
	}
	if len(args) > 0 {
		dir = os.DirFS(args[0])
	}
	return store.seed(ctx, dir, os.Stdout)
}

// importFrom reads the file that args name, and applies it if they say so too, in either order.
func importFrom(ctx context.Context, store *Store, cfg Config, args []string) error {
	const applyFlag = "--apply"
	rules, err := newTargetRules(cfg.BaseURL, cfg.AllowPrivate)
	if err != nil {
		return err
	}
	apply := slices.Contains(args, applyFlag)
	names := slices.DeleteFunc(slices.Clone(args), func(arg string) bool { return arg == applyFlag })
	if len(names) != 1 {
		return errors.New("hop import takes one file, and --apply")
	}
	file, err := os.Open(names[0])
	if err != nil {
		return err
	}
	defer file.Close()
	return store.importLinks(ctx, file, rules, apply, os.Stdout)
}

// askHealth asks the server on port how it is.
func askHealth(ctx context.Context, port int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	url := fmt.Sprintf("http://127.0.0.1:%d/health", port)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// ---- the parts, wired ----

// hop is the service without its listener: what serve and the tests share.
type hop struct {
	server *Server

	stopWork context.CancelFunc // ends polls, probes and the warm-up
	stopJobs context.CancelFunc // ends the counting of clicks, after a last flush
	work     sync.WaitGroup
	jobs     sync.WaitGroup
}

// open wires the parts. Nothing runs yet, and nothing is connected.
func open(ctx context.Context, cfg Config, log *slog.Logger) (*hop, error) {
	store, err := openDatabase(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	local := newLocalTier(cfg.LocalCache)
	var shared *redisTier
	if cfg.RedisURL != "" {
		options, err := redisConfig(cfg.RedisURL)
		if err != nil {
			return nil, fmt.Errorf("REDIS_URL %w", err)
		}
		for _, note := range options.notes {
			log.Info("REDIS_URL " + note)
		}
		shared = openRedis(options, log)
	}
	if cfg.Open() {
		log.Warn("API_TOKEN is not set: everybody who reaches this port may make and delete links")
	}
	clicks := newClickLog(cfg.DataDir, cfg.ClickEvents, store.saveClicks, log)
	shared.know(clicks.leftFor) // after a kill, Redis serves known links before PostgreSQL is back
	server, err := newServer(cfg, store, newCache(shared, local, store), clicks, log)
	if err != nil {
		return nil, err
	}
	return &hop{server: server}, nil
}

// start starts all background work. It returns at once; the server calls itself ready when its
// database is there and its caches are warm.
func (h *hop) start(ctx context.Context) {
	work, stopWork := context.WithCancel(ctx)
	jobs, stopJobs := context.WithCancel(ctx)
	h.stopWork = stopWork
	h.stopJobs = stopJobs
	s := h.server
	h.jobs.Go(func() { s.clicks.run(jobs) })
	h.work.Go(func() { s.store.pg.monitor(work) })
	h.work.Go(func() { s.cache.keepTrue(work) })
	h.work.Go(func() {
		s.getReady(work)
		if s.cfg.KeepClicks > 0 {
			newRemover(s.store, s.cfg.KeepClicks, s.log).run(work)
		}
	})
}

// close ends everything, in the reverse order of starting. ctx bounds the last flush of clicks.
func (h *hop) close(ctx context.Context) {
	s := h.server
	h.stopWork()
	flushed := make(chan struct{})
	go func() {
		h.work.Wait() // the building of an index cannot be stopped
		h.stopJobs()
		h.jobs.Wait()
		close(flushed)
	}()
	select {
	case <-flushed:
		s.clicks.close()
	case <-ctx.Done():
		s.log.Error("clicks left in the journal", "clicks", s.clicks.pendingClicks())
	}
	if s.cache.redis != nil {
		s.cache.redis.pool.Close()
	}
	s.store.pg.close()
}

// getReady waits for PostgreSQL, brings its tables up to date, warms the caches, and then calls the
// server ready. What fails is tried again until ctx ends.
func (s *Server) getReady(ctx context.Context) {
	const firstWait, longestWait = 100 * time.Millisecond, time.Second
	for wait := firstWait; ; wait = min(2*wait, longestWait) {
		err := s.meetDatabase(ctx)
		if err == nil {
			break
		}
		s.log.Warn("not ready", "err", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
	s.cache.warmUp(ctx, s.cfg.WarmLinks, s.log)
	s.ready.Store(true)
	s.log.Info("ready")
}

// meetDatabase asks whether PostgreSQL is well, and gives it the newest schema. The database's id
// then names what is kept of it elsewhere, and says with whom the port may be shared.
func (s *Server) meetDatabase(ctx context.Context) error {
	if err := s.store.pg.probe(ctx); err != nil {
		return err
	}
	id, err := s.store.migrate(ctx)
	if err != nil {
		return err
	}
	s.clicks.belongsTo(id)
	s.cache.redis.know(id)
	if err := s.store.pg.connectAhead(ctx); err != nil {
		return err
	}
	return s.port.claim(ctx, id)
}

// ---- serving ----

const (
	// drainFor is how long balancers see the 503 of /health, and clients Connection: close, before
	// the listener is shut. Shutting it at once broke 500 of 33,000 requests.
	drainFor = 2 * time.Second

	finishFor = 10 * time.Second // the longest that a request under way may still take
	flushFor  = 5 * time.Second  // for the last clicks; what is left survives in the journal

	// readWithin is for a whole request but an upload of users, which has fileWithin: a client that
	// sends slowly keeps a connection no longer.
	readWithin  = 5 * time.Second
	writeWithin = 15 * time.Second
	idleFor     = 60 * time.Second // less than balancers keep theirs costs handshakes, more resets

	maxHeaders = 16 << 10 // bytes
	maxConns   = 20_000   // open connections; each costs connBytes

	// The soft limit on memory, under which garbage is collected less often. It must be above what
	// honestly lives: beyond it the collector never rests, and redirects are ten times slower.
	connBytes  = 24 << 10
	memoryBase = 32 << 20
	tuneEvery  = time.Second // a new limit stops the process for an instant
	tuneStep   = 1 << 20     // so that it is set only when it has moved that far
)

// serve opens everything, serves, and closes in the reverse order. It listens at once, before its
// dependencies answer, unless another hop is on the port: see sharedPort.
func serve(ctx context.Context, cfg Config, log *slog.Logger) error {
	tuneGC(cfg, 0)
	port := joinPort(cfg.Port, log)
	defer port.close()
	if port.isFirst() {
		if err := port.listen(ctx); err != nil {
			return err
		}
	}
	if cfg.Port == 0 {
		cfg.BaseURL = "http://" + port.listener.Addr().String()
	}
	h, err := open(ctx, cfg, log)
	if err != nil {
		return err
	}
	h.server.port = port
	h.start(context.WithoutCancel(ctx)) // background work goes on while requests finish
	listener, err := port.wait(ctx)
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return err
	}
	log.Info("listening", "addr", listener.Addr().String(), "config", cfg)
	var conns atomic.Int64
	server := newHTTPServer(&conns, h.server, log)
	go keepTuned(ctx, cfg, func() int64 { return conns.Load()*connBytes + h.server.heldBytes() })
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case err := <-port.failed:
		return err
	case <-ctx.Done():
	}

	log.Info("draining")
	h.server.draining.Store(true)
	time.Sleep(drainFor)
	finish, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishFor)
	defer cancel()
	err = server.Shutdown(finish)
	flush, cancelFlush := context.WithTimeout(context.WithoutCancel(ctx), flushFor)
	defer cancelFlush()
	h.close(flush)
	log.Info("stopped")
	return err
}

// newHTTPServer returns a server that no client can keep busy for long, and counts its connections
// in conns.
func newHTTPServer(conns *atomic.Int64, handler http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: readWithin,
		ReadTimeout:       readWithin,
		WriteTimeout:      writeWithin,
		IdleTimeout:       idleFor,
		MaxHeaderBytes:    maxHeaders,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnState:         capConns(maxConns, conns),
	}
}

// keepTuned tunes the collector until ctx ends, to what held says lives for a while.
func keepTuned(ctx context.Context, cfg Config, held func() int64) {
	tick := time.NewTicker(tuneEvery)
	defer tick.Stop()
	var tuned int64
	for {
		now := held()
		if max(now-tuned, tuned-now) >= tuneStep {
			tuneGC(cfg, now)
			tuned = now
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// tuneGC lets the heap grow to five times what lives, up to a limit that LOCAL_CACHE and the held
// bytes set, unless GOGC or GOMEMLIMIT say else. A redirect's garbage is small; collecting it four
// times less often is 15 % of throughput.
func tuneGC(cfg Config, held int64) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryBase + int64(cfg.LocalCache)*bytesPerLink + held)
	}
}

// capConns closes new connections while limit are open: idle ones must not cost unbounded memory.
// Their number is kept in open.
func capConns(limit int64, open *atomic.Int64) func(net.Conn, http.ConnState) {
	return func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			if open.Add(1) > limit {
				c.Close()
			}
		case http.StateClosed, http.StateHijacked:
			open.Add(-1)
		}
	}
}
