package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/lib/pq"
)

// dsnCase is a connection string and what becomes of it: it is refused with err, or it is taken as
// want, with notes that hold note.
type dsnCase struct {
	name     string
	raw      string
	password string // as the server gets it; where the string is refused, as its writer meant it
	want     string
	note     string
	err      string
}

// The password of cases in which nothing is wrong with it, and parts of longer ones. No four
// letters of them stand in any host, message or setting.
const plain = "Zq7xWv9Kp2"

// databaseCases are strings for PostgreSQL. want is user@host:port/database sslmode, with every
// host and port where there are several.
var databaseCases = []dsnCase{
	// Providers' own.
	{"Railway", "postgresql://postgres:" + plain + "@postgres.railway.internal:5432/railway", plain,
		"postgres@postgres.railway.internal:5432/railway prefer", "", ""},
	{"Railway, public", "postgresql://postgres:" + plain + "@roundhouse.proxy.rlwy.net:38211/railway",
		plain, "postgres@roundhouse.proxy.rlwy.net:38211/railway prefer", "", ""},
	{"Neon", "postgresql://alex:" + plain + "@ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws." +
		"neon.tech/dbname?sslmode=require&channel_binding=require", plain,
		"alex@ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech:5432/dbname require",
		"channel_binding", ""},
	{"Neon, endpoint in the options", "postgres://alex:" + plain + "@ep-cool.neon.tech/dbname" +
		"?options=endpoint%3Dep-cool&sslmode=require", plain,
		"alex@ep-cool.neon.tech:5432/dbname require", "", ""},
	{"Supabase, direct", "postgresql://postgres:" + plain + "@db.abcdefghij.supabase.co:5432/postgres",
		plain, "postgres@db.abcdefghij.supabase.co:5432/postgres prefer", "", ""},
	{"Supabase, pooler with Prisma", "postgresql://postgres.abcdefghij:" + plain +
		"@aws-0-eu-central-1.pooler.supabase.com:6543/postgres?pgbouncer=true&connection_limit=1",
		plain, "postgres.abcdefghij@aws-0-eu-central-1.pooler.supabase.com:6543/postgres prefer",
		"pgbouncer connection_limit", ""},
	{"Supabase by Vercel", "postgres://postgres.abcdefghij:" + plain +
		"@aws-0-us-east-1.pooler.supabase.com:6543/postgres?sslmode=require&supa=base-pooler.x",
		plain, "postgres.abcdefghij@aws-0-us-east-1.pooler.supabase.com:6543/postgres require",
		"supa", ""},
	{"Supabase, the older advice for Vercel", "postgres://postgres:" + plain +
		"@db.abcdefghij.supabase.co:6543/postgres?workaround=supabase-pooler.vercel", plain,
		"postgres@db.abcdefghij.supabase.co:6543/postgres prefer", "workaround", ""},
	{"Heroku", "postgres://ubcdefgh:" + plain + "@ec2-54-83-1-2.compute-1.amazonaws.com:5432/d3f4",
		plain, "ubcdefgh@ec2-54-83-1-2.compute-1.amazonaws.com:5432/d3f4 prefer", "", ""},
	{"Heroku, for Node", "postgres://ubcdefgh:" + plain +
		"@ec2-54-83-1-2.compute-1.amazonaws.com:5432/d3f4?sslmode=no-verify", plain,
		"ubcdefgh@ec2-54-83-1-2.compute-1.amazonaws.com:5432/d3f4 require",
		"sslmode=no-verify", ""},
	{"RDS", "postgres://hop:" + plain + "@hop.c1a2b3.eu-west-1.rds.amazonaws.com:5432/links" +
		"?sslmode=verify-full&sslrootcert=/etc/ssl/global-bundle.pem", plain,
		"hop@hop.c1a2b3.eu-west-1.rds.amazonaws.com:5432/links verify-full", "", ""},
	{"Render, internal", "postgresql://hop:" + plain + "@dpg-cabc123-a/links_x1y2", plain,
		"hop@dpg-cabc123-a:5432/links_x1y2 prefer", "", ""},
	{"Render, external", "postgresql://hop:" + plain +
		"@dpg-cabc123-a.oregon-postgres.render.com/links_x1y2", plain,
		"hop@dpg-cabc123-a.oregon-postgres.render.com:5432/links_x1y2 prefer", "", ""},
	{"Fly", "postgres://hop:" + plain + "@top2.nearest.of.hop-db.internal:5432/hop?sslmode=disable",
		plain, "hop@top2.nearest.of.hop-db.internal:5432/hop disable", "", ""},
	{"Aiven", "postgres://avnadmin:" + plain + "@pg-1a2b.aivencloud.com:12691/defaultdb" +
		"?sslmode=require", plain, "avnadmin@pg-1a2b.aivencloud.com:12691/defaultdb require", "", ""},
	{"DigitalOcean", "postgresql://doadmin:" + plain + "@db-postgresql-nyc1-1234-do-user-1-0.b.db." +
		"ondigitalocean.com:25060/defaultdb?sslmode=require", plain,
		"doadmin@db-postgresql-nyc1-1234-do-user-1-0.b.db.ondigitalocean.com:25060/defaultdb require",
		"", ""},
	{"Azure, libpq", "host=hop.postgres.database.azure.com port=5432 dbname=links user=hop " +
		"password=" + plain + " sslmode=require", plain,
		"hop@hop.postgres.database.azure.com:5432/links require", "", ""},
	{"Azure, user@server escaped", "postgres://hop%40srv:" + plain +
		"@srv.postgres.database.azure.com/links?sslmode=require", plain,
		"hop@srv@srv.postgres.database.azure.com:5432/links require", "", ""},
	{"Azure, user@server raw", "postgres://hop@srv:" + plain +
		"@srv.postgres.database.azure.com/links", plain, "", "", errRawCharacter.Error()},
	{"Azure, ADO.NET", "Server=hop.postgres.database.azure.com;Database=links;Port=5432;" +
		"User Id=hop;Password=" + plain + ";Ssl Mode=Require;", plain, "", "", errADO.Error()},
	{"Npgsql", "Host=db;Username=hop;Password=" + plain + ";Database=links", plain,
		"", "", errADO.Error()},
	{"Cloud SQL", "postgres://hop:" + plain + "@/links?host=/cloudsql/proj:europe-west1:hop", plain,
		"hop@/cloudsql/proj:europe-west1:hop:5432/links disable", "", ""},
	{"CockroachDB", "postgresql://hop:" + plain + "@free-tier.gcp.cockroachlabs.cloud:26257/" +
		"defaultdb?sslmode=verify-full&options=--cluster%3Dhop-12", plain,
		"hop@free-tier.gcp.cockroachlabs.cloud:26257/defaultdb verify-full", "", ""},
	{"Prisma Postgres", "postgres://hop:" + plain + "@db.prisma.io:5432/postgres" +
		"?sslmode=require&pool=true", plain, "hop@db.prisma.io:5432/postgres require", "pool", ""},

	// What other programs add.
	{"Prisma", "postgresql://hop:" + plain + "@db:5432/links?schema=public&pool_timeout=20", plain,
		"hop@db:5432/links prefer", "schema pool_timeout", ""},
	{"Prisma, a schema of its own", "postgresql://hop:" + plain + "@db:5432/links?schema=short", plain,
		"hop@db:5432/links prefer", "taken as search_path", ""},
	{"libpq's", "postgres://hop:" + plain + "@db/links?gssencmode=disable&keepalives=1&" +
		"keepalives_idle=30&keepalives_interval=5&keepalives_count=3&tcp_user_timeout=9000", plain,
		"hop@db:5432/links prefer", "gssencmode keepalives keepalives_idle keepalives_interval " +
			"keepalives_count tcp_user_timeout", ""},
	{"lib/pq's", "postgres://hop:" + plain + "@db/links?sslnegotiation=direct&sslmode=require&" +
		"application_name=hop&target_session_attrs=any", plain, "hop@db:5432/links require", "", ""},
	{"what hop sets itself", "postgres://hop:" + plain + "@db/links?connect_timeout=10&" +
		"Statement_Timeout=0&binary_parameters=no", plain, "hop@db:5432/links prefer",
		"connect_timeout Statement_Timeout binary_parameters", ""},
	{"PostgreSQL's", "postgres://hop:" + plain + "@db/links?search_path=hop&TimeZone=UTC",
		plain, "hop@db:5432/links prefer", "", ""},
	{"pgx", "postgres://hop:" + plain + "@db/links?sslmode=disable&pool_max_conns=10", plain,
		"hop@db:5432/links disable", "pool_max_conns", ""},
	{"gorm", "host=localhost user=hop password=" + plain + " dbname=links port=9920 " +
		"sslmode=disable TimeZone=Asia/Shanghai", plain,
		"hop@localhost:9920/links disable", "", ""},
	{"SQLAlchemy", "postgresql+psycopg2://hop:" + plain + "@db:5432/links", plain,
		"hop@db:5432/links prefer", "driver of another language", ""},
	{"asyncpg", "postgresql+asyncpg://hop:" + plain + "@db/links?ssl=require&" +
		"prepared_statement_cache_size=0", plain, "hop@db:5432/links require",
		"driver ssl prepared_statement_cache_size", ""},
	{"ssl beside a stricter sslmode", "postgres://hop:" + plain +
		"@db/links?sslmode=verify-full&ssl=true", plain, "hop@db:5432/links verify-full", "ssl", ""},
	{"Rails", "postgres://hop:" + plain + "@db/links?pool=5&encoding=utf8", plain,
		"hop@db:5432/links prefer", "pool encoding", ""},
	{"JDBC", "jdbc:postgresql://db:5432/links?user=hop&password=" + plain, plain,
		"", "", errJDBC.Error()},

	// Forms of both kinds.
	{"several hosts", "postgres://hop:" + plain + "@one:5433,two,[2001:db8::1]:5434/links", plain,
		"hop@one:5433,two:5432,2001:db8::1:5434/links prefer", "", ""},
	{"several hosts, ports apart", "postgres://hop:" + plain + "@one,two/links?port=5433,5434", plain,
		"hop@one:5433,two:5434/links prefer", "", ""},
	{"IPv6", "postgres://hop:" + plain + "@[::1]:5433/links", plain,
		"hop@::1:5433/links prefer", "", ""},
	{"socket", "postgres://hop:" + plain + "@%2Fvar%2Frun%2Fpostgresql/links", plain,
		"hop@/var/run/postgresql:5432/links disable", "", ""},
	{"capitals", "POSTGRES://hop:" + plain + "@db/links", plain, "hop@db:5432/links prefer", "", ""},
	{"underscores", "postgres://hop:" + plain + "@my_db_1/links", plain,
		"hop@my_db_1:5432/links prefer", "", ""},
	{"no password", "postgres://hop@db/links", "", "hop@db:5432/links prefer", "", ""},
	{"no host", "postgres://hop:" + plain + "@/links", plain,
		"hop@localhost:5432/links prefer", "names no host", ""},
	{"no host in key=value", "dbname=links user=hop", "", "hop@localhost:5432/links prefer",
		"names no host", ""},
	{"key=value with quotes", `host = db  user='hop' password='Zq 7x\'Wv\\9K=p2' dbname='my links'`,
		`Zq 7x'Wv\9K=p2`, "hop@db:5432/my links prefer", "", ""},
	{"key=value with backslashes", `host=db user=hop password=Zq\ 7x\'Wv9 dbname=links`,
		`Zq 7x'Wv9`, "hop@db:5432/links prefer", "", ""},
	{"key=value on lines", "host=db\n\tuser=hop\npassword=" + plain + "\ndbname=links\n", plain,
		"hop@db:5432/links prefer", "", ""},
	{"raw characters in key=value", "host=db user=hop dbname=links password=Zq7x@Wv9K/p2?e#f%zz",
		"Zq7x@Wv9K/p2?e#f%zz", "hop@db:5432/links prefer", "", ""},
	{"an empty value", "host=db user=hop password='' dbname=links", "",
		"hop@db:5432/links prefer", "", ""},
	{"an empty value at the end", "host=db user=hop dbname=links password=", "",
		"hop@db:5432/links prefer", "", ""},
	{"a missing value", "host=db user=hop password= dbname=links", "", "", "",
		errNoValue.Error()},
	{"the password in the query", "postgres://db/links?user=hop&password=" + plain, plain,
		"hop@db:5432/links prefer", "", ""},

	// Passwords.
	{"escaped", "postgres://hop:Zq7x%40Wv9K%2Fp2%3Fe%23f%25g@db/links", "Zq7x@Wv9K/p2?e#f%g",
		"hop@db:5432/links prefer", "", ""},
	{"other special letters", "postgres://hop:Zq7x!$&'()*+,;=:Wv9K[{|}]~^@db/links",
		"Zq7x!$&'()*+,;=:Wv9K[{|}]~^", "hop@db:5432/links prefer", "", ""},
	{"raw @", "postgres://hop:Zq7x@Wv9K@db/links", "Zq7x@Wv9K", "", "", "percent-encode"},
	{"raw @ and /", "postgres://hop:Zq7x@Wv9K/p2R5@db/links", "Zq7x@Wv9K/p2R5", "", "",
		"percent-encode"},
	{"raw @ and ?", "postgres://hop:Zq7x@Wv9K?p2R5@db/links", "Zq7x@Wv9K?p2R5", "", "",
		"percent-encode"},
	{"raw @ and #", "postgres://hop:Zq7x@Wv9K#p2R5@db/links", "Zq7x@Wv9K#p2R5", "", "",
		"percent-encode"},
	{"raw /", "postgres://hop:12/Zq7xWv9K@db/links", "12/Zq7xWv9K", "", "", "percent-encode"},
	{"raw ?", "postgres://hop:12?Zq7xWv9K=1@db/links", "12?Zq7xWv9K=1", "", "", "percent-encode"},
	{"raw #", "postgres://hop:12#Zq7xWv9K@db/links", "12#Zq7xWv9K", "", "", "percent-encode"},
	{"raw # in the query", "postgres://db/links?password=12#Zq7xWv9K", "12#Zq7xWv9K", "", "",
		"percent-encode"},
	{"raw %", "postgres://hop:Zq7x%Wv9K@db/links", "Zq7x%Wv9K", "", "", errRawPercent.Error()},
	{"raw % in the query", "postgres://db/links?password=Zq7x%Wv9K", "Zq7x%Wv9K", "", "",
		errRawPercent.Error()},
	{"raw blank", "postgres://hop:Zq7x Wv9K@db/links", "Zq7x Wv9K", "", "", errRawBlank.Error()},
	{"raw & in the query", "postgres://db/links?password=Zq7x&Wv9K=1", "Zq7x&Wv9K=1", "", "",
		"unknown parameter after the password"},
	{"raw & in the query, no =", "postgres://db/links?password=Zq7x&Wv9K", "Zq7x&Wv9K", "", "",
		errParameter.Error()},
	{"blank in key=value", "host=db password=Zq7x Wv9K user=hop", "Zq7x Wv9K", "", "",
		errKeyValue.Error()},
	{"blank and = in key=value", "host=db password=Zq7x Wv9K=p2 user=hop", "Zq7x Wv9K=p2", "", "",
		"unknown parameter after the password"},
	{"single quote in key=value", "host=db password='Zq7x'Wv9K=p2'", "Zq7x'Wv9K=p2", "", "",
		errKeyValue.Error()},
	{"open quote", "host=db password='Zq7xWv9K", "Zq7xWv9K", "", "", errKeyValue.Error()},
	{"open backslash", `host=db password=Zq7xWv9K\`, `Zq7xWv9K\`, "", "", errKeyValue.Error()},
	{"double quotes in key=value", `host=db password="Zq7xWv9K"`, "Zq7xWv9K", "", "",
		errDoubleQuotes.Error()},
	{"the @ forgotten", "postgres://hop:Zq7xWv9K/links", "Zq7xWv9K", "", "", errPort.Error()},

	// What is none of it.
	{"quotes of an env file", `"postgres://hop:` + plain + `@db/links"`, plain, "", "",
		errQuoted.Error()},
	{"single quotes of an env file", `'host=db password=` + plain + `'`, plain, "", "",
		errQuoted.Error()},
	{"a password alone", plain, plain, "", "", errNoDatabase.Error()},
	{"a password that ends in =", "Zq7xWv9Kp2==", "Zq7xWv9Kp2==", "", "", errNoDatabase.Error()},
	{"a password with a name", "hunter=" + plain, plain, "", "", errNoDatabase.Error()},
	{"host and port", "db:5432", "", "", "", errNoDatabase.Error()},
	{"another database", "mysql://hop:" + plain + "@db/links", plain, "", "", errNoDatabase.Error()},
	{"Prisma's proxy", "prisma+postgres://accelerate.prisma-data.net/?api_key=" + plain, plain,
		"", "", errNoDatabase.Error()},
	{"psql's command", "psql 'postgres://hop:" + plain + "@db/links?sslmode=require'", plain, "", "",
		errNoDatabase.Error()},
	{"the line of an env file", "DATABASE_URL=postgres://hop:" + plain + "@db/links", plain, "", "",
		errNoDatabase.Error()},
	{"a reference that nobody resolved", "${{Postgres.DATABASE_URL}}", "", "", "",
		errNoDatabase.Error()},
	{"JSON", `{"host":"db","password":"` + plain + `"}`, plain, "", "", errNoDatabase.Error()},
	{"unknown parameter", "postgres://hop:" + plain + "@db/links?sslmod=disable", plain, "", "",
		"has the parameter sslmod, which hop does not know"},
	{"unknown key", "host=db colour=red password=" + plain, plain, "", "",
		"has the parameter colour, which hop does not know"},
	{"a protection that the driver lacks", "postgres://hop:" + plain + "@db/links?sslcrl=/x.pem",
		plain, "", "", "has the parameter sslcrl, which hop cannot keep to"},
	{"wrong value", "postgres://hop:" + plain + "@db/links?sslmode=REQUIRED", plain, "", "",
		"has a wrong value for the parameter sslmode"},
	{"wrong switch", "postgres://hop:" + plain + "@db/links?sslsni=maybe", plain, "", "",
		"has a wrong value for the parameter sslsni"},
	{"wrong port", "postgres://hop:" + plain + "@db:65536/links", plain, "", "", errPort.Error()},
	{"wrong port in key=value", "host=db port=none", "", "", "", errPort.Error()},
	{"wrong host", "postgres://hop:" + plain + "@db!/links", plain, "", "", errHost.Error()},
	{"a URL for a host", "host=http://db user=hop", "", "", "", errHost.Error()},
	{"open bracket", "postgres://hop:" + plain + "@[::1/links", plain, "", "", errHost.Error()},
	{"an empty host among others", "postgres://hop:" + plain + "@one,,two/links", plain, "", "",
		errHost.Error()},
	{"a path of two", "postgres://hop:" + plain + "@db/links/x", plain, "", "",
		errDatabasePath.Error()},
	{"hosts and ports", "host=one,two port=1,2,3 user=hop", "", "", "", errTogether.Error()},
	{"weak with the system's roots", "postgres://hop:" + plain +
		"@db/links?sslrootcert=system&sslmode=require", plain, "", "", errTogether.Error()},
}

// redisCases are strings for Redis. want is user@address,… and what else is set.
var redisCases = []dsnCase{
	// Providers' own.
	{"Railway", "redis://default:" + plain + "@redis.railway.internal:6379", plain,
		"default@redis.railway.internal:6379", "", ""},
	{"Railway, for ioredis", "redis://default:" + plain + "@redis.railway.internal:6379?family=0",
		plain, "default@redis.railway.internal:6379", "family", ""},
	{"Upstash", "rediss://default:" + plain + "@eu1-sharp-1.upstash.io:6379", plain,
		"default@eu1-sharp-1.upstash.io:6379 tls", "", ""},
	{"Upstash, as its console has it", "redis://default:" + plain + "@eu1-sharp-1.upstash.io:6379",
		plain, "default@eu1-sharp-1.upstash.io:6379 tls", "rediss://", ""},
	{"Upstash's REST", "https://eu1-sharp-1.upstash.io", "", "", "", errNoRedis.Error()},
	{"Heroku", "rediss://:" + plain + "@ec2-3-1-2-3.compute-1.amazonaws.com:24550", plain,
		"@ec2-3-1-2-3.compute-1.amazonaws.com:24550 tls", "", ""},
	{"Heroku, for Celery", "rediss://:" + plain + "@ec2-3-1-2-3.compute-1.amazonaws.com:24550/1" +
		"?ssl_cert_reqs=CERT_NONE", plain,
		"@ec2-3-1-2-3.compute-1.amazonaws.com:24550 tls skip-verify db=1", "ssl_cert_reqs", ""},
	{"certificates demanded", "rediss://:" + plain + "@cache:6379?ssl_cert_reqs=required", plain,
		"@cache:6379 tls", "ssl_cert_reqs", ""},
	{"Redis Cloud", "redis://default:" + plain + "@redis-12345.c1.us-east-1-2.ec2.cloud." +
		"redislabs.com:12345", plain,
		"default@redis-12345.c1.us-east-1-2.ec2.cloud.redislabs.com:12345", "", ""},
	{"Render", "redis://red-cabc123:6379", "", "@red-cabc123:6379", "", ""},
	{"Fly", "redis://default:" + plain + "@fly-hop.upstash.io:6379", plain,
		"default@fly-hop.upstash.io:6379 tls", "rediss://", ""},
	{"DigitalOcean", "rediss://default:" + plain + "@db-redis-1.b.db.ondigitalocean.com:25061", plain,
		"default@db-redis-1.b.db.ondigitalocean.com:25061 tls", "", ""},
	{"Aiven for Valkey", "valkeys://default:" + plain + "@valkey-1.aivencloud.com:12691", plain,
		"default@valkey-1.aivencloud.com:12691 tls", "", ""},
	{"ElastiCache", "rediss://master.hop.abc.euw1.cache.amazonaws.com:6379", "",
		"@master.hop.abc.euw1.cache.amazonaws.com:6379 tls", "", ""},
	{"Azure", "rediss://:Zq7xWv9Kp2=@hop.redis.cache.windows.net:6380", "Zq7xWv9Kp2=",
		"@hop.redis.cache.windows.net:6380 tls", "", ""},
	{"StackExchange.Redis", "hop.redis.cache.windows.net:6380,password=" + plain + ",ssl=True", plain,
		"", "", errNoRedis.Error()},

	// Forms.
	{"host alone", "redis://cache", "", "@cache:6379", "", ""},
	{"number of a database", "redis://cache/2", "", "@cache:6379 db=2", "", ""},
	{"number in the query", "redis://cache?db=3", "", "@cache:6379 db=3", "", ""},
	{"slash at the end", "redis://cache/", "", "@cache:6379", "", ""},
	{"IPv6", "redis://[::1]:6380", "", "@[::1]:6380", "", ""},
	{"password alone", "redis://" + plain + "@cache", plain, "@cache:6379", "", ""},
	{"user alone", "redis://hop:@cache", "", "hop@cache:6379", "", ""},
	{"Sentinels", "redis+sentinel://hop:" + plain + "@one:26380,two/mymaster/2", plain,
		"hop@one:26380,two:26379 master=mymaster db=2", "", ""},
	{"Sentinels with TLS and a password", "rediss+sentinel://:" + plain +
		"@one,two,[::1]/mymaster?sentinel_username=watch&sentinel_password=R5tYuM3", plain,
		"@one:26379,two:26379,[::1]:26379 master=mymaster tls sentinel=watch:R5tYuM3", "", ""},

	// Passwords.
	{"escaped", "redis://:Zq7x%40Wv9K%2Fp2%3Fe%23f%25g@cache", "Zq7x@Wv9K/p2?e#f%g",
		"@cache:6379", "", ""},
	{"raw @", "redis://:Zq7x@Wv9K@cache", "Zq7x@Wv9K", "", "", "percent-encode"},
	{"raw @ and /", "redis://:Zq7x@Wv9K/p2R5@cache", "Zq7x@Wv9K/p2R5", "", "", "percent-encode"},
	{"raw @ and ?", "redis://:Zq7x@Wv9K?p2R5@cache", "Zq7x@Wv9K?p2R5", "", "", "percent-encode"},
	{"raw @ and #", "redis://:Zq7x@Wv9K#p2R5@cache", "Zq7x@Wv9K#p2R5", "", "", "percent-encode"},
	{"raw /", "rediss://:12/Zq7xWv9K@cache:6380", "12/Zq7xWv9K", "", "", "percent-encode"},
	{"raw ?", "redis://:12?Zq7xWv9K@cache", "12?Zq7xWv9K", "", "", "percent-encode"},
	{"raw #", "redis://:12#Zq7xWv9K@cache", "12#Zq7xWv9K", "", "", "percent-encode"},
	{"raw %", "redis://:Zq7x%Wv9K@cache", "Zq7x%Wv9K", "", "", errRawPercent.Error()},
	{"raw blank", "redis://:Zq7x Wv9K@cache", "Zq7x Wv9K", "", "", errRawBlank.Error()},
	{"raw / with Sentinels", "redis+sentinel://:Zq7x/Wv9K@one,two/mymaster", "Zq7x/Wv9K", "", "",
		"percent-encode"},
	{"raw & in the Sentinels' password", "redis+sentinel://one/mymaster?sentinel_password=Zq7x&Wv9K=1",
		"Zq7x&Wv9K=1", "", "", "unknown parameter after the password"},

	// What is none of it.
	{"quotes of an env file", `"redis://:` + plain + `@cache"`, plain, "", "", errQuoted.Error()},
	{"no scheme", "cache:6379", "", "", "", errNoRedis.Error()},
	{"another scheme", "http://:" + plain + "@cache:6379", plain, "", "", errNoRedis.Error()},
	{"redis-cli's command", "redis-cli --tls -u redis://:" + plain + "@cache", plain, "", "",
		errNoRedis.Error()},
	{"no host", "redis://", "", "", "", errHost.Error()},
	{"no host but a password", "redis://:" + plain + "@/0", plain, "", "", errHost.Error()},
	{"wrong port", "redis://cache:port", "", "", "", errPort.Error()},
	{"wrong database", "redis://cache/zero", "", "", "", errRedisDB.Error()},
	{"several hosts", "redis://one,two", "", "", "", errRedisHosts.Error()},
	{"Sentinels without a master", "redis+sentinel://one,two", "", "", "", errNoMaster.Error()},
	{"Lettuce's Sentinels", "redis-sentinel://one,two/0#mymaster", "", "", "", errNoRedis.Error()},
	{"Cluster", "redis+cluster://one,two", "", "", "", errClusterMode.Error()},
	{"TLS by a parameter", "redis://:" + plain + "@cache?ssl=true", plain, "", "",
		errRedisTLS.Error()},
	{"unknown parameter", "redis://:" + plain + "@cache?colour=red", plain, "", "",
		"has the parameter colour, which hop does not know"},
}

// clearPG takes the PG… variables out of the environment until the end of the test.
func clearPG(t *testing.T) {
	t.Helper()
	for _, pair := range os.Environ() {
		name, _, _ := strings.Cut(pair, "=")
		if strings.HasPrefix(name, "PG") || strings.HasPrefix(name, "SSLPG") {
			t.Setenv(name, "") // puts it back at the end
			os.Unsetenv(name)
		}
	}
	t.Setenv("USER", "me")
}

// counts says what became of connection strings.
type counts struct{ accepted, adapted, refused int }

// check compares what became of a string with the case, and counts it.
func (c *counts) check(t *testing.T, tt dsnCase, got, password string, notes []string, err error) {
	t.Helper()
	switch {
	case tt.err != "":
		c.refused++
		if err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: error %v, want %s", tt.name, err, tt.err)
		}
		return
	case err != nil:
		t.Errorf("%s: %v", tt.name, err)
		return
	case tt.note == "":
		c.accepted++
	default:
		c.adapted++
	}
	if got != tt.want || password != tt.password {
		t.Errorf("%s:\ngot  %s %s\nwant %s %s", tt.name, got, password, tt.want, tt.password)
	}
	if (len(notes) == 0) != (tt.note == "") {
		t.Errorf("%s: notes %q, want %q", tt.name, notes, tt.note)
	}
	words := strings.Fields(tt.note)
	all := strings.Join(notes, "\n")
	if !strings.Contains(all, tt.note) {
		for _, word := range words {
			if !strings.Contains(all, word) {
				t.Errorf("%s: no note of %s in %q", tt.name, word, notes)
			}
		}
	}
}

// showDatabase writes a configuration as databaseCases have it.
func showDatabase(c pq.Config) string {
	servers := fmt.Sprintf("%s:%d", c.Host, c.Port)
	for _, more := range c.Multi {
		servers += fmt.Sprintf(",%s:%d", more.Host, more.Port)
	}
	return fmt.Sprintf("%s@%s/%s %s", c.User, servers, c.Database, c.SSLMode)
}

// showRedis writes options as redisCases have them.
func showRedis(o redisOptions) string {
	shown := o.username + "@" + strings.Join(o.addresses, ",")
	if o.master != "" {
		shown += " master=" + o.master
	}
	if o.tls {
		shown += " tls"
	}
	if o.skipVerify {
		shown += " skip-verify"
	}
	if o.db != 0 {
		shown += fmt.Sprintf(" db=%d", o.db)
	}
	if o.sentinelPassword != "" {
		shown += " sentinel=" + o.sentinelUsername + ":" + o.sentinelPassword
	}
	return shown
}

// TestDatabaseConfig tries what people have for PostgreSQL.
func TestDatabaseConfig(t *testing.T) {
	clearPG(t)
	var c counts
	for _, tt := range databaseCases {
		got, notes, err := databaseConfig(tt.raw)
		c.check(t, tt, showDatabase(got), got.Password, notes, err)
		if err == nil && !got.BinaryParameters {
			t.Errorf("%s: no binary parameters", tt.name)
		}
	}
	t.Logf("PostgreSQL: %d strings: %d accepted, %d adapted, %d refused", len(databaseCases),
		c.accepted, c.adapted, c.refused)
}

// TestRedisConfig tries what people have for Redis.
func TestRedisConfig(t *testing.T) {
	var c counts
	for _, tt := range redisCases {
		got, err := redisConfig(tt.raw)
		c.check(t, tt, showRedis(got), got.password, got.notes, err)
	}
	t.Logf("Redis: %d strings: %d accepted, %d adapted, %d refused", len(redisCases),
		c.accepted, c.adapted, c.refused)
}

// TestRedisServerName is the name that a certificate must have: Sentinels tell an address, so that
// each connection has a name of its own.
func TestRedisServerName(t *testing.T) {
	for raw, want := range map[string]string{
		"rediss://cache.example:6380":          "cache.example",
		"rediss+sentinel://one,two/mymaster/0": "",
	} {
		o, err := redisConfig(raw)
		if err != nil || o.serverName != want {
			t.Errorf("%s: server name %q, %v; want %q", raw, o.serverName, err, want)
		}
	}
}

// TestConnectionStringsKeepSecrets looks for every four letters of every password in all that is
// ever said about a connection string, in Config's line of the log, and in the names that are
// looked up.
func TestConnectionStringsKeepSecrets(t *testing.T) {
	clearPG(t)
	var looked []string
	lookup := func(_ context.Context, host string) ([]string, error) {
		looked = append(looked, host)
		return nil, errors.New("no such host")
	}
	all := 0
	for _, setting := range []string{"DATABASE_URL", "DATABASE_PUBLIC_URL", "REDIS_URL"} {
		cases := databaseCases
		if setting == "REDIS_URL" {
			cases = redisCases
		}
		for _, tt := range cases {
			looked = nil
			said := []string{hostOnly(tt.raw)}
			cfg, err := loadConfig(settingsOf(setting + "=" + tt.raw))
			if err != nil {
				said = append(said, err.Error())
			}
			var log bytes.Buffer
			slog.New(slog.NewTextHandler(&log, nil)).Info("listening", "config", cfg)
			slog.New(slog.NewJSONHandler(&log, nil)).Info("listening", "config", cfg)
			said = append(said, log.String())
			if setting == "REDIS_URL" {
				o, err := redisConfig(tt.raw)
				said = append(said, fmt.Sprint(o.notes, err, o.addresses))
			} else {
				c, notes, err := chooseDatabase(t.Context(), cfg.DatabaseURL, cfg.DatabasePublicURL,
					lookup)
				said = append(said, fmt.Sprint(notes, err, c.Host, c.Database))
				_, notes, err = chooseDatabase(t.Context(), tt.raw, "host=public", lookup)
				said = append(said, fmt.Sprint(notes, err, looked))
			}
			all++
			for _, secret := range []string{tt.password, url.PathEscape(tt.password)} {
				for _, part := range fourLetters(secret) {
					if strings.Contains(strings.Join(said, "\n"), part) {
						t.Errorf("%s %s: %q is shown: %q", setting, tt.name, part, said)
					}
				}
			}
		}
	}
	t.Logf("%d strings looked through", all)
}

// fourLetters returns all parts of s that are four bytes long.
func fourLetters(s string) []string {
	var parts []string
	for i := 4; i <= len(s); i++ {
		parts = append(parts, s[i-4:i])
	}
	return parts
}

// TestHostOnly is what logs show of connection strings.
func TestHostOnly(t *testing.T) {
	for raw, want := range map[string]string{
		"": "",
		"postgres://hop:" + plain + "@db.example:5432/links?password=" + plain: "db.example:5432/links",
		"postgres://hop@one,two:1/links":                                       "one,two:1/links",
		"redis://cache":                                                        "cache",
		"redis+sentinel://:" + plain + "@[::1]:26380/mymaster":                 "[::1]:26380/mymaster",
		"host=db password=" + plain:                                            "set",
		"postgres://hop:12/" + plain + "@db/links":                             "set",
		"jdbc:postgresql://db/links":                                           "set",
		plain:                                                                  "set",
		"postgres:///links":                                                    "set",
	} {
		if got := hostOnly(raw); got != want {
			t.Errorf("hostOnly(%s) = %s, want %s", raw, got, want)
		}
	}
}

// TestDriverParameters holds driverParameters to the driver.
func TestDriverParameters(t *testing.T) {
	known := []string{"database"} // the driver takes it for dbname
	for field := range reflect.TypeFor[pq.Config]().Fields() {
		if name := field.Tag.Get("postgres"); name != "" && name != "-" {
			known = append(known, name)
		}
	}
	slices.Sort(known)
	if listed := slices.Sorted(slices.Values(driverParameters)); !slices.Equal(listed, known) {
		t.Errorf("listed %q\nknown  %q", listed, known)
	}
}

// TestDatabaseDefaults is what neither the string nor the environment says, and who has the last
// word.
func TestDatabaseDefaults(t *testing.T) {
	const direct = "postgres://hop@db/links?sslnegotiation=direct"
	tests := []struct {
		raw   string
		env   string
		mode  pq.SSLMode
		attrs pq.TargetSessionAttrs
	}{
		{"postgres://hop@db/links", "", "prefer", "read-write"},
		{"postgres://hop@db/links?target_session_attrs=any", "", "prefer", "any"},
		{"postgres://hop@db/links", "PGTARGETSESSIONATTRS=primary", "prefer", "primary"},
		{"postgres://hop@db/links", "PGSSLMODE=require", "require", "read-write"},
		{"postgres://hop@db/links?sslmode=disable", "PGSSLMODE=require", "disable", "read-write"},
		{"postgres://hop@db/links?sslrootcert=system", "", "verify-full", "read-write"},
		{direct, "", "require", "read-write"},
	}
	for _, tt := range tests {
		t.Run(tt.raw+" "+tt.env, func(t *testing.T) {
			clearPG(t)
			if name, value, ok := strings.Cut(tt.env, "="); ok {
				t.Setenv(name, value)
			}
			c, _, err := databaseConfig(tt.raw)
			if err != nil || c.SSLMode != tt.mode || c.TargetSessionAttrs != tt.attrs {
				t.Errorf("got %s, %s, %v", c.SSLMode, c.TargetSessionAttrs, err)
			}
		})
	}
}

// TestSearchPath is how a schema of its own reaches the server, and that public does not: a pooler
// would refuse to connect for it.
func TestSearchPath(t *testing.T) {
	clearPG(t)
	for schema, want := range map[string]string{"short": "short", "public": ""} {
		c, _, err := databaseConfig("postgres://hop@db/links?schema=" + schema)
		if err != nil || c.Runtime["search_path"] != want {
			t.Errorf("schema=%s: %q, %v", schema, c.Runtime, err)
		}
	}
}

// TestDatabaseEnvironment is what the PG… variables do by themselves.
func TestDatabaseEnvironment(t *testing.T) {
	tests := []struct {
		name string
		env  []string
		want string
		note string
		err  string
	}{
		{"all", []string{"PGHOST=db", "PGPORT=5433", "PGUSER=hop", "PGPASSWORD=p%a@b", "PGDATABASE=d"},
			"hop@db:5433/d prefer", "", ""},
		{"Neon's", []string{"PGHOST=db", "PGUSER=hop", "PGDATABASE=d", "PGSSLMODE=require",
			"PGCHANNELBINDING=require"}, "hop@db:5432/d require", "PGCHANNELBINDING", ""},
		{"empty", []string{"PGHOST=db", "PGUSER=hop", "PGDATABASE=d", "PGGSSENCMODE="},
			"hop@db:5432/d prefer", "", ""},
		{"nothing", nil, "me@localhost:5432/ prefer", "names no host", ""},
		{"wrong", []string{"PGPORT=Zq7xWv9K"}, "", "",
			"the environment variable PGPORT has a wrong value"},
		{"a protection that the driver lacks", []string{"PGREQUIREAUTH=scram-sha-256"}, "", "",
			"the environment variable PGREQUIREAUTH is set, which hop cannot keep to"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			clearPG(t)
			password := ""
			for _, pair := range tt.env {
				name, value, _ := strings.Cut(pair, "=")
				t.Setenv(name, value)
				if name == "PGPASSWORD" {
					password = value
				}
			}
			c, notes, err := chooseDatabase(t.Context(), "", "", nil)
			new(counts).check(t, dsnCase{tt.name, "", password, tt.want, tt.note, tt.err},
				showDatabase(c), c.Password, notes, err)
			if err != nil && !strings.HasPrefix(err.Error(), tt.err) {
				t.Errorf("a string is blamed: %v", err)
			}
		})
	}
}

// TestChooseDatabase is which of three places says where PostgreSQL is. Only known.example and
// localhost resolve.
func TestChooseDatabase(t *testing.T) {
	const internal = "db.internal"
	tests := []struct {
		name    string
		raw     string
		public  string
		env     string
		want    string
		lookups int
		err     string
	}{
		{"URL alone is not looked up", "postgres://a@" + internal + "/x", "", "",
			"a@" + internal + ":5432/x prefer", 0, ""},
		{"URL before PGHOST", "postgres://a@known.example:1/x", "", "PGHOST=env.example",
			"a@known.example:1/x prefer", 0, ""},
		{"PGHOST before public", "", "postgres://b@public/y", "PGHOST=known.example",
			"me@known.example:5432/ prefer", 1, ""},
		{"public alone", "", "postgres://b@public/y", "", "b@public:5432/y prefer", 0, ""},
		{"URL before public", "postgres://a@known.example/x", "postgres://b@public/y", "",
			"a@known.example:5432/x prefer", 1, ""},
		{"an address is not looked up", "postgres://a@127.0.0.1/x", "postgres://b@public/y", "",
			"a@127.0.0.1:5432/x prefer", 0, ""},
		{"nor is an address beside a name", "host=x hostaddr=127.0.0.1 user=a", "host=public", "",
			"a@x:5432/ prefer", 0, ""},
		{"nor a socket", "host=/tmp user=a", "postgres://b@public/y", "",
			"a@/tmp:5432/ disable", 0, ""},
		{"URL's host does not resolve", "postgres://a@" + internal + "/x", "postgres://b@public:1/y",
			"", "b@public:1/y prefer", 1, ""},
		{"one of its hosts does", "postgres://a@" + internal + ",known.example/x",
			"postgres://b@public/y", "",
			"a@" + internal + ":5432,known.example:5432/x prefer", 2, ""},
		{"PGHOST does not resolve", "", "postgres://b@public/y", "PGHOST=" + internal,
			"b@public:5432/y prefer", 1, ""},
		{"bad URL", "postgres://a:" + plain + "%zz@known.example/x", "postgres://b@public/y", "",
			"", 0, "DATABASE_URL has a %"},
		{"bad public URL", "", "mysql://b:" + plain + "@public/y", "", "", 0,
			"DATABASE_PUBLIC_URL is neither"},
		{"bad fallback", "postgres://a@" + internal + "/x", "mysql://b@public/y", "", "", 1,
			"DATABASE_PUBLIC_URL is neither"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			clearPG(t)
			if name, value, ok := strings.Cut(tt.env, "="); ok {
				t.Setenv(name, value)
			}
			lookups := 0
			lookup := func(ctx context.Context, host string) ([]string, error) {
				lookups++
				if _, bounded := ctx.Deadline(); !bounded {
					t.Error("the lookup may last for ever")
				}
				if host != "known.example" && host != "localhost" {
					return nil, errors.New("no such host")
				}
				return []string{"127.0.0.1"}, nil
			}
			c, notes, err := chooseDatabase(t.Context(), tt.raw, tt.public, lookup)
			if tt.err != "" {
				if err == nil || !strings.HasPrefix(err.Error(), tt.err) {
					t.Errorf("error %v, want %s…", err, tt.err)
				}
			} else if err != nil || showDatabase(c) != tt.want {
				t.Errorf("got %s, %v; want %s", showDatabase(c), err, tt.want)
			}
			if lookups != tt.lookups {
				t.Errorf("%d lookups, want %d", lookups, tt.lookups)
			}
			fellBack := strings.Contains(strings.Join(notes, "\n"), "DATABASE_PUBLIC_URL is used")
			if want := tt.raw+tt.env != "" && strings.Contains(tt.want, "@public"); fellBack != want {
				t.Errorf("notes %q", notes)
			}
		})
	}
}
